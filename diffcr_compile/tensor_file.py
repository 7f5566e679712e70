"""Write tensors as a safetensors file, whole or not at all, a tensor at a time.

The library's own writer makes a temporary file of its own, which nobody removes after a kill, and does not force
the file to the disk. The format is eight bytes with the length of a JSON header, the header, the bytes of all
tensors; https://huggingface.co/docs/safetensors. What is written here equals the library's output to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffcr_compile.durable import published

# as the format names them, largest elements first: so every tensor lies on a multiple of its element's size
_TYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES)}
_ALIGN = 8


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; a crash leaves the old one or the new one.

    Args:
        path: of the file; its folder is made if it does not exist.
        tensors: name -> tensor of any shape, device and layout.
        metadata: texts beside them.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header = _header(names, tensors, metadata)
    size = len(header) + sum(_bytes(tensor) for tensor in tensors.values())
    with published(path, size) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _header(
    names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> bytes:
    """Length and JSON, filled up with blanks to a multiple of eight bytes."""
    rows: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + _bytes(tensor)
        rows[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
