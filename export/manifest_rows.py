"""What the manifest says about programs, graphs and golden files."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffcr_compile.blocks import leaves
from diffcr_compile.export.golden import golden_path, output_names, read_golden
from diffcr_compile.export.onnx_model import OPSET
from diffcr_compile.export.parity import Parity
from diffcr_compile.program import Program
from diffcr_compile.runtime.constants import constant_to_json
from diffcr_compile.schedule import TimestepBuckets

_PACKAGES = ("diffcr-compile", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def constant_rows(program: Program) -> dict[str, Any]:
    """Arguments that the capture fixed, named like inputs."""
    found = {}
    for start, tree in program.signature.constants:
        for path, value in leaves(tree, start):
            known = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            found["_".join(map(str, path))] = constant_to_json(known)
    return found


def bucket_rows(program: Program, graphs: Sequence[str]) -> list[dict[str, Any]]:
    assert program.schedule is not None
    buckets: TimestepBuckets = program.schedule.buckets
    return [
        {
            "index": index,
            "low": low,
            "high": high,
            "weight": buckets.weights[index],
            "onnx": graphs[index],
            "golden": golden_path(index),
        }
        for index, (low, high) in enumerate(buckets.ranges())
    ]


def schedule_of(program: Program) -> dict[str, Any]:
    assert program.schedule is not None
    return program.schedule.to_json()


def tensor_specs(example: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in example.items()
    ]


def output_specs(folder: Path) -> list[dict[str, Any]]:
    outputs = read_golden(folder / golden_path(0))[1]
    return [
        {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
        for name, array in zip(output_names(len(outputs)), outputs, strict=True)
    ]


def parity_section(
    rows: Sequence[Parity], shared: Sequence[Parity], precision: Sequence[Parity]
) -> dict[str, Any]:
    """The gate, the worst figures, and every row."""
    every = (*rows, *shared, *precision)
    return {
        "tolerance": max(row.tolerance for row in rows),
        "measure": rows[0].measure,
        "max_abs": max(row.max_abs for row in every),
        "rel_l2": max(row.rel_l2 for row in every),
        "buckets": [dataclasses.asdict(row) for row in rows],
        "profiles": [dataclasses.asdict(row) for row in shared],
        "precision": [dataclasses.asdict(row) for row in precision],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "opset": str(OPSET)}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
