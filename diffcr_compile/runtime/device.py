"""Which device this is, as engines are kept apart by: its name, its compute capability, its TensorRT."""

from __future__ import annotations

import dataclasses
import importlib
import re
from types import ModuleType
from typing import Any

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
    """

    name: str
    sm: int
    runtime: str
    version: str

    @property
    def folder(self) -> str:
        """Name of the folder of its engines: ``orin_sm87_trt10.3.0``."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "device"
        return f"{name}_sm{self.sm}_{_SHORT[self.runtime]}{self.version}"

    def __str__(self) -> str:
        return f"{self.name}, SM{self.sm}, {self.runtime} {self.version}"


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


def this_device(trt: Any, cuda: Any, runtime: str = "tensorrt") -> Device:
    """The device that CUDA uses.

    Args:
        trt: the module of the runtime.
        cuda: a :class:`diffcr_compile.runtime.cuda_api.Cuda`.
        runtime: its name.
    """
    facts = cuda.device_facts()
    return Device(name=facts.name, sm=facts.sm, runtime=runtime, version=version_of(trt))
