"""What a backend holds on the device: engines, contexts, buffers; given back once and in the right order."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffcr_compile.runtime.cuda_api import Cuda
from diffcr_compile.runtime.device_buffers import ActivationBuffer, TensorBuffers

Key = tuple[str, int, int]  # name of an engine, number of the profile, of the lengths in it


@dataclasses.dataclass
class ReadyContext:
    """An execution context that is ready to run, and its recorded work.

    Attributes:
        context: TensorRT's.
        graph: recorded CUDA graph; None before the second run, or if it cannot be recorded.
        runs: how often it ran.
    """

    context: Any
    graph: Any = None
    runs: int = 0


class LoadedEngines:
    """Engines and all that they need on the device. It knows nothing of who uses it, so that it can outlive them.

    Args:
        cuda: the device.
        runtime: TensorRT's, which must live as long as its engines.

    Attributes:
        cuda_stream: on which everything runs.
        activations: scratch memory of all contexts.
        buffers: of the inputs and outputs.
        engines: name -> TensorRT's engine.
        contexts: that are ready to run.
    """

    def __init__(self, cuda: Cuda, runtime: Any) -> None:
        self._cuda, self._runtime = cuda, runtime
        self.activations = ActivationBuffer(cuda)
        self.buffers = TensorBuffers(cuda)
        self.engines: dict[str, Any] = {}
        self.contexts: dict[Key, ReadyContext] = {}
        self.cuda_stream = cuda.make_cuda_stream()

    def drop_contexts(self) -> None:
        """Contexts go before their engine: TensorRT wants it so."""
        if self.contexts:
            self._cuda.synchronize(self.cuda_stream)
        while self.contexts:
            context = self.contexts.popitem()[1]
            if context.graph is not None:
                self._cuda.destroy_graph(context.graph)

    def close(self) -> None:
        """Give all memory of the device back; to be called once, when nothing runs."""
        self.drop_contexts()
        self.engines.clear()
        self.buffers.close()
        self.activations.close()
        self._cuda.destroy_cuda_stream(self.cuda_stream)
