"""What an executor gives the measurement: two calls, ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


class UnavailableError(Exception):
    """The executor is not installed, or cannot work on this device; says why, in its own words."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model in an executor, its inputs on the device.

    Attributes:
        run: one call; the work may still go on when it returns.
        outputs: what the last call gave, flat.
        remarks: what the reader should know.
    """

    run: Callable[[], object]
    outputs: Callable[[], Sequence[Any]]
    remarks: tuple[str, ...] = ()
