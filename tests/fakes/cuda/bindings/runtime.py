"""The part of ``cuda.bindings.runtime`` that is used, on memory of this process.

It is strict where the real one would compute nonsense or crash: addresses that were freed, copies over the
end of an allocation, work that is enqueued while a stream is recorded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import os
from typing import Any


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclasses.dataclass
class State:
    """What the device holds; tests read and reset it."""

    total: int = 8_000_000_000
    taken: int = 0  # by other processes
    allocations: dict[int, ctypes.Array[Any]] = dataclasses.field(default_factory=dict)
    peak: int = 0
    streams: set[int] = dataclasses.field(default_factory=set)
    recording: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    graphs: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    launches: int = 0
    can_capture: bool = True
    next_number: int = 1

    def number(self) -> int:
        self.next_number += 1
        return self.next_number

    @property
    def used(self) -> int:
        return sum(len(buffer) for buffer in self.allocations.values())


state = State()


def reset() -> None:
    state.__init__()  # type: ignore[misc]  # same object, new fields


def memory(address: int, size: int) -> Any:
    """A view of `size` bytes of the device at an address, which may lie inside an allocation."""
    for start, buffer in state.allocations.items():
        if start <= address and address + size <= start + len(buffer):
            return (ctypes.c_char * size).from_buffer(buffer, address - start)
    raise MemoryError(f"{size} bytes at {address} are not allocated")


def cudaGetDeviceCount() -> tuple[int, int]:
    return 0, int(os.environ.get("FAKE_CUDA_DEVICES", "1"))


def cudaGetErrorString(error: Any) -> tuple[int, bytes]:
    return 0, {0: b"no error", 2: b"out of memory"}.get(int(error), b"operation not permitted")


@dataclasses.dataclass
class Properties:
    name: bytes
    major: int
    minor: int
    integrated: int
    totalGlobalMem: int


def cudaGetDeviceProperties(device: int) -> tuple[int, Properties]:
    sm = int(os.environ.get("FAKE_CUDA_SM", "87"))
    return 0, Properties(b"Orin", sm // 10, sm % 10, 0, state.total)


def cudaMemGetInfo() -> tuple[int, int, int]:
    return 0, state.total - state.used - state.taken, state.total


def cudaMalloc(size: int) -> tuple[int, int]:
    if size > state.total - state.used - state.taken:
        return 2, 0
    address = (1 << 20) + sum(len(b) + 512 for b in state.allocations.values())
    while any(s - size - 256 < address < s + len(b) for s, b in state.allocations.items()):
        address += 1 << 20
    address -= address % 256
    state.allocations[address] = (ctypes.c_char * size)()
    state.peak = max(state.peak, state.used)
    return 0, address


def cudaFree(address: int) -> tuple[int]:
    if address not in state.allocations:
        return (1,)
    del state.allocations[address]
    return (0,)


def cudaStreamCreate() -> tuple[int, int]:
    stream = state.number()
    state.streams.add(stream)
    return 0, stream


def cudaStreamDestroy(stream: int) -> tuple[int]:
    if stream not in state.streams:
        return (1,)
    state.streams.remove(stream)
    return (0,)


def cudaMemcpyAsync(target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
    if stream not in state.streams or stream in state.recording:
        return (1,)
    if kind == cudaMemcpyKind.cudaMemcpyHostToDevice:
        ctypes.memmove(memory(target, size), source, size)
    else:
        ctypes.memmove(target, memory(source, size), size)
    return (0,)


def cudaStreamSynchronize(stream: int) -> tuple[int]:
    return (0 if stream in state.streams and stream not in state.recording else 1,)


def cudaStreamBeginCapture(stream: int, mode: int) -> tuple[int]:
    if not state.can_capture:
        return (801,)
    state.recording[stream] = []
    return (0,)


def cudaStreamEndCapture(stream: int) -> tuple[int, int]:
    if stream not in state.recording:
        return 1, 0
    graph = state.number()
    state.graphs[graph] = state.recording.pop(stream)
    return 0, graph


def cudaGraphInstantiate(graph: int, flags: int) -> tuple[int, int]:
    ready = state.number()
    state.graphs[ready] = state.graphs[graph]
    return 0, ready


def cudaGraphDestroy(graph: int) -> tuple[int]:
    del state.graphs[graph]
    return (0,)


cudaGraphExecDestroy = cudaGraphDestroy


def cudaGraphLaunch(graph: int, stream: int) -> tuple[int]:
    state.launches += 1
    for work in state.graphs[graph]:
        work()
    return (0,)
