"""The ONNX graphs of ``export.precision: fp16``, dense and compressed."""

from __future__ import annotations

from pathlib import Path

from diffcr_compile.export.precision import HalfSettings, half_graphs
from diffcr_compile.program import Program


def write_half(program: Program, path: Path) -> Path:
    """Write a FROZEN float32 program with its products in float16, checked on its example.

    Raises:
        AccuracyError: float16 is too far from float32, or overflows.
    """
    if not path.exists():
        half = half_graphs([program], HalfSettings(), lambda _: program.example)
        model, _ = half.export(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(model.SerializeToString())
        partial.replace(path)
    return path
