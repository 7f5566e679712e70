"""Which packages are installed, and what needs them."""

from __future__ import annotations

import importlib.metadata
from typing import TypedDict

NEEDED_FOR = {
    "torch": "everything but running an artifact",
    "numpy": "everything",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "validate, bench and run on the CPU",
    "onnxruntime-gpu": "run on a CUDA device",
    "diffusers": "the reference model and diffusers: sources",
    "transformers": "pipelines of diffusers",
    "accelerate": "pipelines of diffusers, loaded with little memory",
    "peft": "calibration.train: lora",
    "jinja2": "report",
    "pillow": "report",
    "tensorrt": "engines on the device",
}


class Row(TypedDict):
    """One package; `version` is None where it is not installed."""

    name: str
    version: str | None
    needed_for: str


def examine() -> list[Row]:
    """One row per package."""
    rows: list[Row] = []
    for name, purpose in NEEDED_FOR.items():
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        rows.append({"name": name, "version": version, "needed_for": purpose})
    return rows
