"""Time and peak memory of capture, route, freeze and export, by timestep buckets and by blocks.

    python -m benchmarks.export_cost            # an hour on one CPU core, 6 GB of memory
    python -m benchmarks.export_cost --smoke --out x.json

Each case is a process of its own; its plain dense ``torch.onnx.export`` runs in the same process, before or after in
turns. The large model has 28 blocks of width 1,152 (611 M parameters, random). ``mapped`` cases have weights that are
mapped from a safetensors file into a model that was made on the meta device: memory that counts is then what is not
backed by a file, at its peak in any stage. Ratios of time are of processor seconds, with one thread, because the machine is
shared. The large model is also exported as a user would, with all cores, and there the time that passes counts too: torch's
exporter runs on one core, the runs of the model that check a graph on all. Writes ``benchmarks/results/export_cost.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import diffcr_compile as dcr
from benchmarks.speed import memory
from benchmarks.speed.models import (
    mixed_columns,
    new_pixart,
    pixart_inputs,
    schedule_of,
)
from benchmarks.speed.plain import plain_onnx
from benchmarks.speed.record import read_record, record_path, write_record
from diffcr_compile.export import artifact, bucket_graphs
from diffcr_compile.export.checks import Checks

TEXT_WIDTH_LARGE = 4096
# FLUX.1: 12 billion parameters, 19 double blocks of 340 million and 38 single ones of 142 million; in float32.
FLUX_BYTES, FLUX_BLOCK_BYTES = 4 * 12e9, 4 * 340e6


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is exported.

    Attributes:
        width: of the stream.
        blocks: of the model.
        buckets: timestep buckets, no two alike.
        mapped: weights are mapped from a file.
        plain: also export the dense model with plain torch, in turns.
        tokens: of an image.
        threads: of torch and ONNX Runtime.
    """

    width: int
    blocks: int
    buckets: int
    mapped: bool = False
    plain: bool = False
    tokens: int = 256
    threads: int = 1

    @property
    def text_width(self) -> int:
        return TEXT_WIDTH_LARGE if self.width > 1000 else 256


BY_BUCKETS = [Case(384, 6, buckets, plain=True) for buckets in (1, 2, 4, 8)]
BY_BLOCKS = [Case(64, blocks, 2, tokens=64) for blocks in (6, 16, 28, 56)]
LARGE = [Case(1152, 28, 4, plain=True)]
AS_A_USER = [dataclasses.replace(LARGE[0], threads=os.cpu_count() or 1)]
MAPPED = [Case(1152, blocks, 2, mapped=True, tokens=64) for blocks in (4, 12, 28)]
EVERY = {
    "buckets": BY_BUCKETS,
    "blocks": BY_BLOCKS,
    "large": LARGE,
    "large_all_cores": AS_A_USER,
    "mapped": MAPPED,
}
SMOKE = {
    "buckets": [Case(64, 2, 2, plain=True, tokens=64)],
    "mapped": [Case(64, 2, 2, mapped=True, tokens=64)],
}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """All stages of a case in this process."""
    inputs = pixart_inputs(case.tokens, 1, case.text_width)
    found: dict[str, Any] = {**dataclasses.asdict(case), "imports_peak": memory.read("VmHWM")}
    private = memory.PrivatePeak() if case.mapped else None
    if case.mapped:
        write_weights(case, folder / "model.safetensors")
    with memory.stage() as built:
        model = mapped_model(case, folder) if case.mapped else new_model(case)
    found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    found["model"] = row(built)
    if case.plain:
        with memory.stage() as plain:
            plain_onnx(model, inputs, folder / "plain.onnx")
        found["plain"] = row(plain)
    with memory.stage() as routed_stage, torch.no_grad():
        routed = dcr.route(model, inputs)
    if private:
        found["private_peak"] = {"before_and_capture_and_route": private.take()}
    schedule = schedule_of(routed.program, mixed_columns(case.blocks, case.buckets))
    with memory.stage() as freeze_stage:
        frozen = dcr.freeze(routed, schedule=schedule)
    seconds = watch_graphs()
    with memory.stage() as export_stage:
        made = dcr.export(frozen, folder / "out")
    found |= {"capture_and_route": row(routed_stage), "freeze": row(freeze_stage)}
    found["export"] = {**row(export_stage), "graphs": seconds}
    if private:
        found["private_peak"]["freeze_and_export"] = private.take()
    found["graphs"] = len(schedule.buckets)
    found["derived"] = len(seconds["derived"])
    found["worst_difference"] = max(r["max_abs"] for r in made.manifest.parity["buckets"])
    if case.plain:
        with memory.stage() as plain:
            plain_onnx(model, inputs, folder / "again.onnx")
        found["plain_again"] = row(plain)
    return found


def row(stage: memory.Stage) -> dict[str, Any]:
    return {
        "seconds": stage.seconds,
        "processor_seconds": stage.processor,
        "peak": stage.peak,
        "after": stage.after,
    }


def new_model(case: Case) -> nn.Module:
    return new_pixart(case.width, case.blocks, case.tokens, case.text_width)


def write_weights(case: Case, path: Path) -> None:
    """A safetensors file of random weights, one tensor in memory at a time."""
    with torch.device("meta"):
        model = new_model(case)
    tensors = dict(model.state_dict())
    header, end = {}, 0
    for name, value in tensors.items():
        size = value.numel() * 4
        header[name] = {
            "dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            part = generator.standard_normal(value.numel(), np.float32) * np.float32(0.02)
            file.write(part.tobytes())


def mapped_model(case: Case, folder: Path) -> nn.Module:
    """The model on the meta device, its weights mapped into it: nothing is read before it is used."""
    from safetensors import safe_open

    with torch.device("meta"):
        model = new_model(case)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(weights, assign=True)
    positions = new_pixart(case.width, 1, case.tokens, case.text_width).pos_embed.pos_embed
    model.pos_embed.pos_embed = positions  # a buffer that is computed, not stored
    return model.eval()


def watch_graphs() -> dict[str, list[float]]:
    """Processor seconds of every ONNX graph from now on, exported or derived, of golden outputs and of checks."""
    found: dict[str, list[float]] = {"exported": [], "derived": [], "golden": [], "checks": []}

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args)
            finally:
                found[kind].append(time.process_time() - started)

        return call

    artifact.export_graph = timed("exported", artifact.export_graph)
    bucket_graphs.at_kept_tokens = timed("derived", bucket_graphs.at_kept_tokens)
    artifact._write_golden = timed("golden", artifact._write_golden)
    for name in ("bucket", "shared"):
        setattr(Checks, name, timed("checks", getattr(Checks, name)))
    return found


def in_a_process(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.export_cost", "--case", json.dumps(dataclasses.asdict(case)), "--folder", folder]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(cases: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures that the targets are about."""
    found: dict[str, Any] = {}
    for case in cases.get("buckets", []):
        graphs = case["export"]["graphs"]
        if graphs["derived"]:
            first = sum(graphs["exported"])
            found[f"further_bucket_of_{case['buckets']}"] = max(graphs["derived"]) / first
    by_buckets = {
        case["buckets"]: case["export"]["processor_seconds"]
        for case in cases.get("buckets", [])
    }
    if len(by_buckets) > 2:
        most, two = max(by_buckets), 2
        # golden outputs and three checks included: they run the model, whatever made its graph
        found["further_bucket_with_checks"] = (
            (by_buckets[most] - by_buckets[two]) / (most - two) / by_buckets[1]
        )
    for case in cases.get("large", []):
        plain = plain_export(case, "processor_seconds")
        stages = ("capture_and_route", "freeze", "export")
        spent = case["export"]["graphs"]
        found["large"] = {
            "peak_over_weights": {s: case[s]["peak"] / case["weights"] for s in stages},
            "plain_peak_over_weights": case["plain"]["peak"] / case["weights"],
            "export_over_plain": case["export"]["processor_seconds"] / plain,
            "graphs_over_plain": (sum(spent["exported"]) + sum(spent["derived"])) / plain,
            "golden_over_plain": sum(spent["golden"]) / plain,
            "checks_over_plain": sum(spent["checks"]) / plain,
            "further_bucket": max(spent["derived"]) / sum(spent["exported"]),
        }
    for case in cases.get("large_all_cores", []):
        found["large_all_cores"] = {
            f"export_over_plain_{clock}": case["export"][name] / plain_export(case, name)
            for clock, name in (("elapsed", "seconds"), ("processor", "processor_seconds"))
        }
    if len(cases.get("mapped", [])) > 1:
        found["mapped"] = private_memory(cases["mapped"])
    if len(cases.get("blocks", [])) > 2:
        blocks = np.array([case["blocks"] for case in cases["blocks"]], float)
        found["by_blocks"] = {
            stage: fit(
                blocks,
                np.array([case[stage]["processor_seconds"] for case in cases["blocks"]]),
            )
            for stage in ("capture_and_route", "freeze", "export")
        }
    return found


def plain_export(case: dict[str, Any], clock: str) -> float:
    """Of the two plain exports, before and after, the mean."""
    return (case["plain"][clock] + case["plain_again"][clock]) / 2


def private_memory(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Private memory at its peak, as a line over the bytes of all weights, and what it says of a 12-billion model.

    Where the line starts, a block at a time is tried, in float64 and more than once: that part grows with the block.
    """
    weights = np.array([case["weights"] for case in cases], float)
    peaks = np.array([max(case["private_peak"].values()) for case in cases], float)
    slope, start = np.polyfit(weights, peaks, 1)
    of_a_block = np.polyfit([case["blocks"] for case in cases], weights, 1)[0]
    imports = max(case["imports_peak"] for case in cases)
    per_block = (start - imports) / of_a_block
    of_flux = imports + per_block * FLUX_BLOCK_BYTES + slope * FLUX_BYTES
    return {
        "per_byte_of_weights": float(slope),
        "imports": imports,
        "per_byte_of_a_block": float(per_block),
        "of_flux_in_float32": float(of_flux),
    }


def fit(x: Any, y: Any) -> dict[str, float]:
    """A straight line and how much of the variance it explains."""
    slope, start = np.polyfit(x, y, 1)
    rest = ((y - slope * x - start) ** 2).sum()
    return {
        "seconds_per_block": float(slope),
        "start": float(start),
        "r2": float(1 - rest / ((y - y.mean()) ** 2).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(EVERY), help="one group of cases, again")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = record_path("export_cost", args.out, args.smoke)
    if args.case:
        case = Case(**json.loads(args.case))
        torch.set_num_threads(case.threads)
        print(json.dumps(measure(case, args.folder)))
        shutil.rmtree(args.folder / "out")
        return
    cases = read_record(args.out)["cases"] if args.out.exists() and not args.smoke else {}
    for group, wanted in (SMOKE if args.smoke else EVERY).items():
        if args.only in (None, group):
            cases[group] = []
            for case in wanted:
                cases[group].append(in_a_process(case))
                write_record(args.out, {"cases": cases, "summary": summary(cases)})
                print(group, case, cases[group][-1]["export"]["seconds"], flush=True)
    print(json.dumps(summary(cases), indent=1))


if __name__ == "__main__":
    main()
