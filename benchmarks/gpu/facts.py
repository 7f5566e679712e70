"""What the figures depend on: device, driver, clocks as found, versions."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from typing import Any

import torch

from diffcr_compile.summary import environment

_FIELDS = (
    "name", "driver_version", "compute_cap", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm",
    "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu", "utilization.gpu", "persistence_mode",
)  # fmt: skip
_PACKAGES = (
    "diffusers",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "triton",
    "cuda-python",
)
_SECONDS = 20


def device_facts(device: str) -> dict[str, Any]:
    """Name of the device and, of a GPU, what nvidia-smi says about it now."""
    if device != "cuda":
        return {"kind": "cpu", "name": "cpu"}
    smi = _nvidia_smi()
    name = smi.get("name") or torch.cuda.get_device_name(0)
    return {"kind": "cuda", "name": name, "nvidia_smi": smi, "cuda": torch.version.cuda}


def versions() -> dict[str, str]:
    """Of everything that measures or is measured."""
    found = environment()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        import onnxruntime
    except ImportError:
        return found
    # the package that is imported, where the CPU's and the GPU's are both installed
    return {**found, "onnxruntime_imported": str(onnxruntime.__version__)}


def slug(name: str) -> str:
    """A device's name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _nvidia_smi() -> dict[str, str]:
    """The first device's fields; empty without nvidia-smi. Nothing is changed on the device."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_FIELDS)}",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    values = [value.strip() for value in said.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False))
