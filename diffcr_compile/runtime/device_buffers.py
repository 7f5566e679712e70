"""Memory on the device: one buffer per input and output, and one for the activations of all engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from diffcr_compile.runtime.cuda_api import Cuda


class TensorBuffers:
    """One buffer per tensor, at an address that stays, so that recorded CUDA graphs stay valid.

    All timestep buckets take and give tensors of the same shapes, and only one runs at a time: they
    share the buffers.

    Args:
        cuda: what allocates.

    Attributes:
        addresses: tensor -> where its buffer is.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.addresses: dict[str, int] = {}

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Make the buffers, tensor -> bytes; if one does not fit, those that did are there to be closed."""
        for name, size in sizes.items():
            self.addresses[name] = self._cuda.allocate(size)

    def close(self) -> None:
        """Give the memory back."""
        while self.addresses:
            self._cuda.free(self.addresses.popitem()[1])


class ActivationBuffer:
    """Scratch memory that every context uses in turn; it grows only where a context asks for more.

    Args:
        cuda: what allocates.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.size = 0
        self.address: int | None = None

    def reserve(self, size: int) -> int:
        """Address of at least `size` bytes. Contexts that hold an earlier address must be gone by now."""
        if self.address is None or size > self.size:
            self.close()
            self.address, self.size = self._cuda.allocate(size), size
        return self.address

    def close(self) -> None:
        """Give the memory back."""
        if self.address is not None:
            self._cuda.free(self.address)
        self.address, self.size = None, 0


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor; complex ones go in as real pairs, which have as many."""
    return math.prod(shape) * np.dtype(dtype).itemsize
