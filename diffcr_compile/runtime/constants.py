"""Arguments that a capture fixed, as JSON: what a call may say about them is what the graph was made with."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def constant_to_json(value: Any) -> Any:
    """Plain values as they are, arrays by type, shape and hash, anything else by its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": digest}
    return {"text": f"{type(value).__name__}: {value}"}
