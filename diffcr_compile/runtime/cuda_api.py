"""The few calls to the CUDA runtime that an engine needs, over NVIDIA's cuda-python."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from diffcr_compile.errors import EnvironmentMissingError, ResourceError

Array = npt.NDArray[Any]
_MODULES = (
    "cuda.bindings.runtime",
    "cuda.cudart",
)  # the second is the name before cuda-python 12.6
_OUT_OF_MEMORY = 2


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What CUDA says about its device.

    Attributes:
        name: such as ``Orin``.
        sm: compute capability as an integer, 87 for 8.7.
        integrated: whether it shares its memory with the host.
        total_bytes: of its memory.
    """

    name: str
    sm: int
    integrated: bool
    total_bytes: int


class Cuda(Protocol):
    """What the engines need of CUDA. Addresses, streams and graphs are integers or opaque."""

    def device_facts(self) -> DeviceFacts: ...
    def free_bytes(self) -> int: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def make_cuda_stream(self) -> int: ...
    def destroy_cuda_stream(self, cuda_stream: int) -> None: ...
    def upload(self, address: int, array: Array, cuda_stream: int) -> None: ...
    def download(self, array: Array, address: int, cuda_stream: int) -> None: ...
    def synchronize(self, cuda_stream: int) -> None: ...
    def begin_capture(self, cuda_stream: int) -> None: ...
    def end_capture(self, cuda_stream: int) -> Any: ...
    def launch(self, graph: Any, cuda_stream: int) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


class CudaPython:
    """:class:`Cuda` over cuda-python.

    Raises:
        EnvironmentMissingError: cuda-python is not installed, or there is no device.
    """

    def __init__(self) -> None:
        self._api = _import_cuda()
        error, count = self._api.cudaGetDeviceCount()
        if int(error) != 0 or count < 1:
            raise EnvironmentMissingError(
                f"CUDA finds no device on this machine ({self._reason(error)}). An engine runs on the "
                "device that it was built on; elsewhere use backend='onnxruntime'.",
                code="DCR-E003",
            )

    def device_facts(self) -> DeviceFacts:
        """Name, compute capability and memory of device 0 of this process."""
        (properties,) = self._call("cudaGetDeviceProperties", 0)
        name = properties.name
        text = name.decode() if isinstance(name, bytes) else str(name)
        return DeviceFacts(
            name=text.rstrip("\0"),
            sm=10 * int(properties.major) + int(properties.minor),
            integrated=bool(properties.integrated),
            total_bytes=int(properties.totalGlobalMem),
        )

    def free_bytes(self) -> int:
        """Memory of the device that is free now.

        On a board the files that the system keeps in memory count as used for CUDA, although they
        give way; what Linux calls available does not count them.
        """
        free, _ = self._call("cudaMemGetInfo")
        if not self.device_facts().integrated:
            return int(free)
        return max(int(free), available_bytes() or 0)

    def allocate(self, size: int) -> int:
        """Memory on the device, 256-byte aligned; at least one byte, so that it has an address."""
        (address,) = self._call("cudaMalloc", max(size, 1))
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def make_cuda_stream(self) -> int:
        """A CUDA stream of its own: the default one cannot be captured."""
        (cuda_stream,) = self._call("cudaStreamCreate")
        return int(cuda_stream)

    def destroy_cuda_stream(self, cuda_stream: int) -> None:
        """Destroy it."""
        self._call("cudaStreamDestroy", cuda_stream)

    def upload(self, address: int, array: Array, cuda_stream: int) -> None:
        """Copy a contiguous array to the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(
            "cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, cuda_stream
        )

    def download(self, array: Array, address: int, cuda_stream: int) -> None:
        """Copy from the device into a contiguous array."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(
            "cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, cuda_stream
        )

    def synchronize(self, cuda_stream: int) -> None:
        """Wait until all work of the CUDA stream is done."""
        self._call("cudaStreamSynchronize", cuda_stream)

    def begin_capture(self, cuda_stream: int) -> None:
        """What follows on the CUDA stream is recorded, not run."""
        # thread-local: what other threads of the application do meanwhile does not end the capture
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", cuda_stream, mode)

    def end_capture(self, cuda_stream: int) -> Any:
        """The recorded work, ready to be launched."""
        (graph,) = self._call("cudaStreamEndCapture", cuda_stream)
        try:
            (ready,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return ready

    def launch(self, graph: Any, cuda_stream: int) -> None:
        """Run recorded work."""
        self._call("cudaGraphLaunch", graph, cuda_stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy recorded work."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        error, *results = getattr(self._api, name)(*arguments)
        if int(error) == 0:
            return tuple(results)
        if int(error) == _OUT_OF_MEMORY:
            raise ResourceError(
                f"{name}{arguments[:1]}: the device is out of memory. Load with swap=True, which "
                "keeps one timestep bucket at a time, or free memory: other processes, the desktop.",
                code="DCR-R003",
            )
        raise ResourceError(
            f"{name} failed: {self._reason(error)}. Errors of CUDA stay for the rest of the "
            "process: start it again; if it comes back, run diffcr doctor --device.",
            code="DCR-R004",
        )

    def _reason(self, error: Any) -> str:
        text = self._api.cudaGetErrorString(error)[1]
        return text.decode() if isinstance(text, bytes) else str(text)


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that a program can get without swapping, as Linux says; None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _import_cuda() -> Any:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise EnvironmentMissingError(
        f"cuda-python cannot be imported ({reasons[0]}). Install the one of this machine's CUDA: "
        "pip install 'cuda-python>=12.6,<13' on JetPack 6, 'cuda-python>=13' on JetPack 7.",
        code="DCR-E002",
    )
