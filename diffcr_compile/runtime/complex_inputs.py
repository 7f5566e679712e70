"""Complex tensors as the graphs have them: real, with a last axis of 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Shape and type, as a graph has them.
GraphTensor = tuple[tuple[int, ...], str]
_REAL = {"complex64": "float32", "complex128": "float64"}


def as_graph_input(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A complex array (*S) as a real one (*S, 2), real part and imaginary part; others as they are."""
    if not np.iscomplexobj(array):
        return array
    return np.stack([array.real, array.imag], axis=-1)


def as_graph_tensor(spec: Mapping[str, Any]) -> GraphTensor:
    """Shape and type that a graph has for a tensor of the manifest."""
    shape, dtype = tuple(spec["shape"]), str(spec["dtype"])
    return ((*shape, 2), _REAL[dtype]) if dtype in _REAL else (shape, dtype)


def tensor_words(tensor: GraphTensor | None) -> str:
    """For messages, such as ``float32[2, 16]``."""
    return "nothing" if tensor is None else f"{tensor[1]}{list(tensor[0])}"
