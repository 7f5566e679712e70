"""Which device this is, as engines are kept apart by: its name, compute capability, TensorRT, board and memory."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from diffcr_compile.device_state import board_model
from diffcr_compile.errors import EnvironmentMissingError, UsageError

# Name of a runtime -> the Python module that it comes as.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_SHORT = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}


@dataclasses.dataclass(frozen=True)
class Device:
    """What an engine is bound to.

    Attributes:
        name: as CUDA gives it, such as ``Orin``; ``none`` for a build without a GPU.
        sm: compute capability as an integer, 87 for 8.7.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the runtime, such as ``10.3.0``.
        board: such as ``NVIDIA Jetson AGX Orin Developer Kit``; "" where the system names none. Every module
            of a generation has the same name and compute capability for CUDA.
        memory_gb: of the device, rounded; modules of one board differ in it. 0 for a build without a GPU.
    """

    name: str
    sm: int
    runtime: str
    version: str
    board: str = ""
    memory_gb: int = 0

    @property
    def folder(self) -> str:
        """Name of the folder of its engines: ``orin_sm87_trt10.3.0``."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "device"
        return f"{name}_sm{self.sm}_{_SHORT[self.runtime]}{self.version}"

    def __str__(self) -> str:
        memory = f"{self.memory_gb} GB" if self.memory_gb else ""
        more = ", ".join(filter(None, (self.board, memory)))
        name = f"{self.name} ({more})" if more else self.name
        return f"{name}, SM{self.sm}, {self.runtime} {self.version}"

    def differs_from(self, here: Device) -> str:
        """What of `here` is other than where an engine was built, in words; "" if it may run there."""
        if (self.runtime, self.version) != (here.runtime, here.version):
            return f"{here.runtime} {here.version}"
        if self.sm != here.sm:
            return f"SM{here.sm}"
        if self.name != here.name:
            return f"the name {here.name}"
        if self.board != here.board:
            return f"the board {here.board or 'without a name'}"
        return "" if same_memory(self.memory_gb, here.memory_gb) else f"{here.memory_gb} GB"


def same_memory(built_gb: int, here_gb: int) -> bool:
    """Whether two rounded sizes may be of one module: a system takes a little more or less of it for itself."""
    return abs(built_gb - here_gb) <= 1


def tensorrt_module(runtime: str = "tensorrt") -> ModuleType:
    """The Python module of a runtime.

    Raises:
        UsageError: there is no such runtime.
        EnvironmentMissingError: it cannot be imported here; says how to get it.
    """
    if runtime not in MODULES:
        raise UsageError(f"runtime must be one of {sorted(MODULES)}, got {runtime!r}")
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        remedy = (
            "On a Jetson it comes with JetPack (apt install python3-libnvinfer) and belongs to the "
            "system's python3: in a virtual environment, make it with --system-site-packages. "
            "Elsewhere: pip install 'diffcr-compile[gpu]'."
            if runtime == "tensorrt"
            else "pip install 'diffcr-compile[rtx]' (Linux, x86-64)."
        )
        raise EnvironmentMissingError(
            f"{MODULES[runtime]} cannot be imported ({error}). {remedy}", code="DCR-E002"
        ) from error


def version_of(trt: Any) -> str:
    """Version of a TensorRT module."""
    return str(trt.__version__)


def this_device(
    trt: Any, cuda: Any, runtime: str = "tensorrt", root: Path = Path("/")
) -> Device:
    """The device that CUDA uses.

    Args:
        trt: the module of the runtime.
        cuda: a :class:`diffcr_compile.runtime.cuda_api.Cuda`.
        runtime: its name.
        root: below which the file lies that names the board.
    """
    facts = cuda.device_facts()
    return Device(
        name=facts.name,
        sm=facts.sm,
        runtime=runtime,
        version=version_of(trt),
        board=board_model(root),
        memory_gb=round(facts.total_bytes / 1e9),
    )
