"""Read a safetensors file with numpy alone, so that golden outputs can be read on a device.

The format: eight bytes with the length of a JSON header, the header, the bytes of all tensors.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import ArtifactError

Array = npt.NDArray[Any]
_AGAIN = "Make the artifact anew with diffcr compile."
_MAX_HEADER = 100_000_000  # as the safetensors library has it
_TYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of a file, by name.

    Raises:
        ArtifactError: the file is missing or damaged, or holds a type that numpy lacks.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"its header has {length} of {len(data)} bytes")
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        body = memoryview(data)[8 + length :]
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        _check_covers(entries, len(body))
        return {name: _tensor(name, entry, body) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. {_AGAIN}") from error


def _check_covers(entries: Mapping[str, Any], size: int) -> None:
    """Tensors lie one after the other and fill the file; else some bytes would have two readings."""
    at = 0
    for start, end in sorted(entry["data_offsets"] for entry in entries.values()):
        if start != at or end < start:
            raise ValueError(f"a tensor starts at byte {start}, expected {at}")
        at = end
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, the file {size}")


def _tensor(name: str, entry: Mapping[str, Any], body: memoryview) -> Array:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"{name} is {entry['dtype']}, which numpy does not have")
    dtype = np.dtype(_TYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    shape = [int(length) for length in entry["shape"]]
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes for the shape {shape}")
    array = np.frombuffer(body[start:end], dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=True)
