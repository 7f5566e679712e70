"""Complex inputs as the graphs take them: real, with a last axis of 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def as_graph_input(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A complex array (*S) as a real one (*S, 2), real part and imaginary part; others as they are."""
    if not np.iscomplexobj(array):
        return array
    return np.stack([array.real, array.imag], axis=-1)
