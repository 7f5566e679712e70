"""A model that runs but has no gradients, said in words: it overwrites what its own backward needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffcr_compile.errors import UnsupportedModelError

MESSAGE = "modified by an inplace operation"  # torch has no class for it


@contextlib.contextmanager
def writes_in_place_in_words() -> Iterator[None]:
    """Around a backward.

    Raises:
        UnsupportedModelError: the forward wrote in place into a tensor that the backward needs.
    """
    try:
        yield
    except RuntimeError as error:
        if MESSAGE not in str(error):
            raise
        raise UnsupportedModelError(
            "the model has no gradients, and as an eager model would have none: its forward writes in place into a tensor that "
            f"its own backward needs ({str(error).partition(' Hint:')[0]}). Write out of place there (y = y + z for y += z, no "
            "functions with a trailing underscore), or calibrate without steps (calibration.steps: 0, --steps 0).",
            code="DCR-M005",
        ) from error
