"""Ours against what one would otherwise use, at the same MACs: same model, machine and process, in turns.

    python -m benchmarks.peers
    python -m benchmarks.peers --smoke --out x.json

Peers: the dense model through plain ``torch.onnx.export``; 2-D token merging (tomesd's way, all of a block on merged
tokens); uniform Mixture-of-Depths as one writes it in PyTorch, eager and through ``torch.onnx.export``. All keep as many
tokens in every block; ours too, so the MACs are equal but for routers and similarities, which are not counted. Merging
has no ONNX graph: boolean masks have no static shape. Writes ``benchmarks/results/peers.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.merging import merged
from benchmarks.speed.mod import add_depths
from benchmarks.speed.models import dit_inputs, new_dit, routed_dit
from benchmarks.speed.plain import plain_onnx
from benchmarks.speed.record import record_path, write_record
from diffcr_compile.block_graphs import frozen_at
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program, rebuild_call
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.timing import in_turns

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is compared."""

    width: int = 384
    blocks: int = 6
    tokens: int = 1024
    batch: int = 1
    keep_ratio: float = 0.5

    @property
    def kept(self) -> int:
        return round(self.keep_ratio * self.tokens)


def merging_model(size: Size) -> nn.Module:
    model = new_dit(size.width, size.blocks, size.tokens)
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.forward = merged(block.forward, size.kept, generator)
    return model


def depths_model(size: Size) -> nn.Module:
    model = new_dit(size.width, size.blocks, size.tokens)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        add_depths(block, size.width, size.kept)
    return model.eval()


def torch_run(module: Any, call: dict[str, Any]) -> Run:
    def run() -> None:
        with torch.inference_mode():
            module(**call)

    return run


def onnx_run(path: Path, size: Size) -> Run:
    session = make_session(path, threads=1)
    inputs = {n: v.numpy() for n, v in dit_inputs(size.tokens, size.batch).items()}
    return lambda: session.run(None, inputs)


def all_runs(size: Size, folder: Path) -> tuple[dict[str, Run], Program]:
    """Every way by name."""
    inputs = dit_inputs(size.tokens, size.batch)
    model, routed = routed_dit(size.width, size.blocks, size.tokens, size.batch)
    frozen = frozen_at(routed, {b.name: size.kept for b in routed.blocks})
    (folder / "ours.onnx").write_bytes(onnx_from_program(frozen).SerializeToString())
    plain_onnx(model, inputs, folder / "dense.onnx")
    depths = depths_model(size)
    plain_onnx(depths, inputs, folder / "depths.onnx")
    ours = torch_run(frozen.module.eval(), rebuild_call(frozen.signature, frozen.example))
    return {
        "ours, ONNX Runtime": onnx_run(folder / "ours.onnx", size),
        "ours, torch": ours,
        "dense, ONNX Runtime": onnx_run(folder / "dense.onnx", size),
        "dense, torch": torch_run(model, inputs),
        "Mixture-of-Depths, ONNX Runtime": onnx_run(folder / "depths.onnx", size),
        "Mixture-of-Depths, torch": torch_run(depths, inputs),
        "token merging, torch": torch_run(merging_model(size), inputs),
    }, routed


def measure(size: Size, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        runs, routed = all_runs(size, Path(folder))
        timings = in_turns(runs, "dense, ONNX Runtime", 0.01, rounds)
    costs = measure_costs(routed, size.kept, size.keep_ratio)
    share = (
        costs.outer + sum(costs.at(b.name, size.kept) for b in routed.blocks)
    ) / costs.dense
    rows = [
        {
            "name": name,
            "speed_up_over_dense_onnx": 1 / timing.share,
            "error": timing.error / timing.share,
            "slower_than_ours": timing.share / timings[f"ours, {name.split(', ')[1]}"].share,
            "slower_than_our_fastest": timing.share / timings["ours, ONNX Runtime"].share,
        }
        for name, timing in timings.items()
    ]
    return {**dataclasses.asdict(size), "macs_share": share, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("peers", args.out, args.smoke)
    torch.set_num_threads(1)
    sizes = (
        [Size(64, 2, 64)] if args.smoke else [Size(), Size(tokens=256), Size(keep_ratio=0.75)]
    )
    cases = [measure(size, 7 if args.smoke else args.rounds) for size in sizes]
    write_record(args.out, {"threads": 1, "cases": cases})
    for case in cases:
        print(f"{case['tokens']} tokens, MACs {case['macs_share']:.1%}")
        for row in case["rows"]:
            print(
                f"  {row['name']:32} {row['speed_up_over_dense_onnx']:.2f} x dense, "
                f"{row['slower_than_ours']:.2f} x the time of ours"
            )


if __name__ == "__main__":
    main()
