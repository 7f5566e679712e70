"""Resident memory of an artifact with all of its buckets loaded, against one session of the plain dense export.

    python -m benchmarks.load_memory
    python -m benchmarks.load_memory --smoke --out x.json

Each is loaded in a process of its own and run once in every bucket. Counted is what the process holds over what it held
with numpy and ONNX Runtime imported: its resident pages, and as well its proportional share of them, in which a page
that is mapped twice counts once. Writes ``benchmarks/results/load_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import memory
from benchmarks.speed.record import record_path, write_record

BUCKETS, TOKENS = 8, 256


def loaded(folder: Path, buckets: int, way: str) -> dict[str, Any]:
    """Memory of this process with an artifact, or with its dense baseline, loaded and used."""
    import onnxruntime  # noqa: F401 - counts as what was there before

    from diffcr_compile.runtime import load
    from diffcr_compile.runtime.dense import DenseRunner

    arrays = dict(np.load(folder / "inputs.npz"))
    before = memory.read("VmRSS"), memory.private()
    if way == "dense":
        runner: Any = DenseRunner(folder / "dense.onnx", 1)
        runner(**arrays)
    else:
        runner = load(folder / "out", threads=1, verify=False)
        for row in runner.manifest.buckets[:buckets]:
            middle = np.full_like(arrays["timestep"], round((row["low"] + row["high"]) / 2))
            runner(**{**arrays, "timestep": middle})
    return {
        "way": way,
        "resident": memory.read("VmRSS") - before[0],
        "proportional": memory.private() - before[1],
    }


def make(folder: Path, width: int, blocks: int, buckets: int, tokens: int) -> int:
    """The artifact, the dense baseline and inputs; bytes of the weights."""
    import diffcr_compile as dcr
    from benchmarks.speed.models import dit_inputs, mixed_columns, new_dit, schedule_of
    from benchmarks.speed.plain import plain_onnx

    model, inputs = new_dit(width, blocks, tokens), dit_inputs(tokens, 1)
    routed = dcr.route(model, inputs)
    schedule = schedule_of(routed.program, mixed_columns(blocks, buckets))
    dcr.export(dcr.freeze(routed, schedule=schedule), folder / "out")
    plain_onnx(model, inputs, folder / "dense.onnx")
    tensors = {n: v.numpy() for n, v in inputs.items() if hasattr(v, "numpy")}
    np.savez(folder / "inputs.npz", **tensors)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def in_a_process(folder: Path, buckets: int, way: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.load_memory",
        "--folder",
        str(folder),
        "--way",
        way,
    ]
    command += ["--buckets", str(buckets)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(width: int, blocks: int, buckets: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make(folder, width, blocks, buckets, tokens)
        dense = in_a_process(folder, buckets, "dense")
        rows = {str(n): in_a_process(folder, n, "artifact") for n in (1, buckets)}
    return {
        "width": width,
        "blocks": blocks,
        "tokens": tokens,
        "weights": weights,
        "dense": dense,
        "buckets": rows,
        "resident_over_dense": rows[str(buckets)]["resident"] / dense["resident"],
        "proportional_over_dense": rows[str(buckets)]["proportional"] / dense["proportional"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--buckets", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = record_path("load_memory", args.out, args.smoke)
    if args.way:
        print(json.dumps(loaded(args.folder, args.buckets, args.way)))
        return
    cases = (
        [(64, 2, 2, 64)]
        if args.smoke
        else [(384, 6, BUCKETS, TOKENS), (1152, 4, BUCKETS, TOKENS)]
    )
    rows = [measure(*case) for case in cases]
    write_record(args.out, {"cases": rows})
    for row in rows:
        print(
            f"width {row['width']}: all buckets loaded {row['resident_over_dense']:.2f} x the resident "
            f"memory of one dense session, {row['proportional_over_dense']:.2f} x its proportional memory"
        )


if __name__ == "__main__":
    main()
