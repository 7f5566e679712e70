"""One file of weights under all graphs of an artifact (ONNX external data)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, TensorProto

from diffcr_compile.durable import atomic_write_bytes, disk_error, published
from diffcr_compile.errors import ArtifactError

Buffer = bytes | memoryview
WEIGHTS_FILE = "weights.bin"
# Smaller tensors stay in the graph: shape inference needs the small ones, and a reference to
# external data costs about 80 bytes itself.
INLINE_BYTES = 256
# Tensors above this start on a page, so that a runtime can map them.
LARGE_BYTES = 1 << 20
PAGE, LINE = 4096, 64
# Bytes that are read at once to compare a tensor with one that was written.
COMPARED = 1 << 20
# Types of integers by their bytes: what a value is does not matter where it is copied.
_AS_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class WeightsWriter:
    """Moves tensors of one graph after the other into a common file, each content once.

    Use it as a context; the file appears under its name when the context ends well. Then no part of
    it is ever in memory twice, however many graphs there are.

    Args:
        path: the weights file; graphs refer to it by its bare name, so they must lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._published = published(path)
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # by what `_sample` takes
        self._end = 0
        self._file: IO[bytes] | None = None
        self._turned = np.empty(
            0, np.uint8
        )  # one matrix at a time; fresh memory takes longer than the copy

    def __enter__(self) -> WeightsWriter:
        self._file = self._published.__enter__().open("w+b")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            self._file.close()
        except OSError as failed:  # the last bytes are written here
            if error is None:
                full = disk_error(failed, self.path, self._end)
                kind, error, trace = type(full), full, failed.__traceback__
        self._published.__exit__(kind, error, trace)

    def take(self, model: ir.Model) -> None:
        """Write the weights of a graph that is no protobuf yet, one after the other, and let go of each.

        What is left in the graph is references, so it never holds a second copy of the weights. Integers
        stay: they are sizes and positions, which rewrites of the graph read.
        """
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if tensor.nbytes < INLINE_BYTES:
                continue
            offset, length = self._place(self._memory_of(tensor))
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )

    def externalize(self, model: ModelProto) -> None:
        """Replace the large initializers of `model` by references into the file, in place."""
        mine = {place for places in self._places.values() for place in places}
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                location, *place = place_of(tensor)
                if location == self.path.name and tuple(place) in mine:
                    continue
                raise ArtifactError(
                    f"initializer {tensor.name} already lies in another file; load it first"
                )
            data = _raw_bytes(tensor)
            if len(data) >= INLINE_BYTES:
                _refer(tensor, self.path.name, *self._place(data))

    def _memory_of(self, tensor: ir.TensorProtocol) -> Buffer:
        """Where a tensor's values lie one after the other, until the next call; a copy where they do not."""
        values = tensor.numpy()
        if values.ndim == 2 and values.flags.f_contiguous and not values.flags.c_contiguous:
            values = self._turn(values)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def _turn(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A transposed matrix in C order. torch copies it block by block, several times faster than numpy."""
        if self._turned.nbytes < values.nbytes:
            self._turned = np.empty(values.nbytes, np.uint8)
        kind = _AS_INTEGERS[values.itemsize]
        turned = self._turned[: values.nbytes].view(kind).reshape(values.shape)
        torch.from_numpy(turned).copy_(torch.from_numpy(values.view(kind)))
        return turned

    def _place(self, data: Buffer) -> tuple[int, int]:
        """(offset, length) of `data` in the file; written if it is new."""
        alike = self._places.setdefault(_sample(data), [])
        for place in alike:
            if self._holds(place, data):
                return place
        assert self._file is not None
        align = PAGE if len(data) > LARGE_BYTES else LINE
        padding = -self._end % align
        try:
            self._file.write(b"\0" * padding)
            self._file.write(data)
        except OSError as failed:
            needed = self._end + padding + len(data)  # so far; how much follows nobody knows
            raise disk_error(failed, self.path, needed) from failed
        alike.append((self._end + padding, len(data)))
        self._end += padding + len(data)
        return alike[-1]

    def _holds(self, place: tuple[int, int], data: Buffer) -> bool:
        """Whether these very bytes lie at a place of the file."""
        offset, length = place
        whole = memoryview(data)
        assert self._file is not None
        try:
            self._file.seek(offset)
            return length == len(whole) and all(
                self._file.read(min(COMPARED, length - start))
                == whole[start : start + COMPARED]
                for start in range(0, length, COMPARED)
            )
        except OSError as failed:
            raise disk_error(failed, self.path) from failed
        finally:
            self._file.seek(self._end)


def write_shared_weights(
    models: Mapping[str, ModelProto], folder: Path, weights_name: str = WEIGHTS_FILE
) -> None:
    """Write ``folder/<name>`` for each model, all over one file of weights.

    Args:
        models: file name -> model. The models are changed: their large tensors become references.
        folder: made if it does not exist.
        weights_name: name of the weights file in `folder`.
    """
    with WeightsWriter(folder / weights_name) as writer:
        for model in models.values():
            writer.externalize(model)
    for name, model in models.items():
        atomic_write_bytes(folder / name, model.SerializeToString(deterministic=True))


def place_of(tensor: TensorProto) -> tuple[str, int, int]:
    """File, offset and length of a tensor that lies in a file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0))


def _sample(data: Buffer) -> bytes:
    """Equal for equal tensors, and seldom for others: weights are compared in full only where this is equal."""
    values = np.frombuffer(data, np.uint8)
    spread = values[:: max(1, len(values) // 4096)]
    return hashlib.sha256(b"%d " % len(values) + spread.tobytes()).digest()


def _raw_bytes(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    data: bytes = onnx.numpy_helper.to_array(tensor).tobytes()
    return data


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    name, dims, kind = tensor.name, list(tensor.dims), tensor.data_type
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
