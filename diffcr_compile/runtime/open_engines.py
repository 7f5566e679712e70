"""From an artifact to its engines on this device, with all that must hold before one may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.cuda_api import Cuda, CudaPython
from diffcr_compile.runtime.device import Device, tensorrt_module, this_device
from diffcr_compile.runtime.find_engines import checked_sidecar, find_engines
from diffcr_compile.runtime.tensorrt_backend import TensorRTBackend


def open_engines(
    artifact: Path,
    manifest: Manifest,
    runtime: str = "tensorrt",
    *,
    swap: bool = False,
    cuda_graphs: bool = True,
    verify: bool = True,
) -> TensorRTBackend:
    """The engines of an artifact for this device, ready to run.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        swap: see :class:`TensorRTBackend`.
        cuda_graphs: see :class:`TensorRTBackend`.
        verify: compare the hash of every plan with its sidecar.

    Raises:
        EnvironmentMissingError: TensorRT, cuda-python or the GPU is missing.
        ArtifactError: there are no engines that may run here; says why and how to build them.
        ResourceError: the device has too little memory.
    """
    trt, cuda, here = open_device(runtime)
    # where all plans are read at once, each is hashed as it is read; hashing them before would be the same twice
    folder, sidecar = find_engines(artifact, manifest, here, verify and swap)
    return TensorRTBackend(
        artifact,
        manifest,
        folder,
        sidecar,
        trt,
        cuda,
        swap=swap,
        cuda_graphs=cuda_graphs,
        verify=verify,
    )


def open_unchecked(
    folder: Path, manifest: Manifest, runtime: str = "tensorrt"
) -> TensorRTBackend:
    """Engines that were just built, for the comparison with the golden outputs; not for use.

    Args:
        folder: of the engines.
        manifest: of the artifact.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
    """
    trt, cuda, here = open_device(runtime)
    sidecar = checked_sidecar(folder, manifest, here)
    return TensorRTBackend(
        folder.parent.parent, manifest, folder, sidecar, trt, cuda, swap=True
    )


def open_device(runtime: str = "tensorrt") -> tuple[Any, Cuda, Device]:
    """TensorRT's module, CUDA, and which device this is."""
    trt = tensorrt_module(runtime)
    cuda = CudaPython()
    return trt, cuda, this_device(trt, cuda, runtime)
