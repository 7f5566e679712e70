"""Bytes of an artifact by timestep buckets, against the weights of one plain dense export.

    python -m benchmarks.artifact_size
    python -m benchmarks.artifact_size --smoke --out x.json

Writes ``benchmarks/results/artifact_size.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import diffcr_compile as dcr
from benchmarks.speed.models import mixed_columns, new_pixart, pixart_inputs, schedule_of
from benchmarks.speed.plain import plain_onnx
from benchmarks.speed.record import record_path, write_record

BUCKETS = 8


def sizes(width: int, blocks: int, buckets: int, tokens: int) -> dict[str, Any]:
    """Bytes of everything, and of the artifact's parts."""
    model, inputs = new_pixart(width, blocks, tokens), pixart_inputs(tokens, 1)
    routed = dcr.route(model, inputs)
    columns = schedule_of(routed.program, mixed_columns(blocks, buckets))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plain").mkdir()
        plain_onnx(model, inputs, folder / "plain/dense.onnx")
        out = dcr.export(dcr.freeze(routed, schedule=columns), folder / "out").folder
        dense = bytes_below(folder / "plain")
        graphs = {p.name: p.stat().st_size for p in sorted((out / "onnx").glob("*.onnx"))}
        parts = {
            part.name: bytes_below(part) for part in sorted(out.iterdir()) if part.is_dir()
        }
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "plain_dense": dense,
            "weights": (out / "onnx/weights.bin").stat().st_size,
            "graphs": graphs,
            "parts": parts,
            "onnx_over_weights_of_one": parts["onnx"] / dense,
            "all_over_weights_of_one": bytes_below(out) / dense,
        }
    return {"width": width, "blocks": blocks, "tokens": tokens, "buckets": buckets, **found}


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("artifact_size", args.out, args.smoke)
    cases = (
        [(64, 2, 2, 64)] if args.smoke else [(384, 6, BUCKETS, 256), (1152, 4, BUCKETS, 256)]
    )
    rows = [sizes(*case) for case in cases]
    write_record(args.out, {"cases": rows})
    for row in rows:
        print(
            f"width {row['width']}, {row['buckets']} buckets: onnx/ {row['onnx_over_weights_of_one']:.4f} x "
            f"one dense export, with golden outputs {row['all_over_weights_of_one']:.4f} x"
        )


if __name__ == "__main__":
    main()
