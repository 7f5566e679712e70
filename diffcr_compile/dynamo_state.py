"""A failure under one of our dispatch modes must not become a failure of the user's model for ever.

Ops that compile themselves (flex attention) call Dynamo, which remembers for the rest of the process what it
could not trace, also where the reason was a mode that is no longer active.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def forgotten_failures() -> Iterator[None]:
    """Let Dynamo forget what it learned when the body raises."""
    try:
        yield
    except Exception:
        torch._dynamo.reset()
        raise
