"""Engines of the reference model in both modes, built with TensorRT-RTX on a CPU, and what float16 costs in accuracy.

    python -m benchmarks.engines            # about ten minutes on two CPU cores, no GPU

The schedule is one by hand (no calibration), with untrained routers: four timestep buckets, K from 64 to 256 of 256
tokens; accuracy also after a short calibration. Writes ``benchmarks/results/engines.json``: bytes and scratch memory of
every engine for SM86 and SM120, how far float16, bfloat16 and int8 are from float32 along a sampling run, and scratch
memory with and without fused attention.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.calibrate.samplers import FlowEuler
from diffcr_compile.config import CompileConfig
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.engine_plan import LAYOUT_REASONS, plan_engines
from diffcr_compile.export.bucket_graphs import BucketGraphs
from diffcr_compile.export.half import compute_in_half
from diffcr_compile.export.half_run import Ranges
from diffcr_compile.export.onnx_model import exported_program, graph_from_exported
from diffcr_compile.export.precision import HalfGraphs, Precision, half_graphs
from diffcr_compile.export.profiles_graph import group_buckets, open_program, tensorrt_topk
from diffcr_compile.export.rtx_build import build_rtx
from diffcr_compile.export.weights import WEIGHTS_FILE, WeightsWriter
from diffcr_compile.passes.open_kept_tokens import input_name
from diffcr_compile.program import Program, run_flat
from diffcr_compile.reference import demo
from diffcr_compile.reference.model import REFERENCE_CONFIG, new_reference_dit
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from diffcr_compile.stages import half_settings, sampling_states
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/engines.json"
CAPABILITIES = ("SM86", "SM120")
STEPS = 20
# Kept tokens of each block in each timestep bucket.
KEPT = (
    (256, 256, 256, 256),
    (128, 160, 192, 256),
    (128, 128, 128, 128),
    (64, 128, 128, 192),
    (64, 96, 128, 192),
    (64, 64, 128, 128),
    (96, 128, 160, 128),
    (256, 192, 128, 64),
)
HEADS = 2
# Enough tokens that one score matrix is larger than all other scratch memory.
LARGE_SIZE, LARGE_TOKENS = 96, 48 * 48


def frozen_programs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Program]:
    """The reference model under the schedule by hand."""
    routed = dcr.route(model, inputs)
    blocks = routed.program.blocks
    schedule = TokenSchedule(
        {spec.name: kept for spec, kept in zip(blocks, KEPT, strict=True)},
        {spec.name: spec.num_tokens for spec in blocks},
        TimestepBuckets.even(len(KEPT[0])),
    )
    return [graph.program for graph in dcr.freeze(routed, schedule=schedule)]


class GraphsOnly(NamedTuple):
    """What of a manifest names the graphs."""

    buckets: list[dict[str, Any]]
    profile_graphs: list[dict[str, Any]]
    schedule: Mapping[str, Sequence[int]]


def half_along_a_run(frozen: Sequence[Program], precision: Precision = "fp16") -> HalfGraphs:
    """The half-precision or int8 programs, checked on every state of a sampling run."""
    sampler = FlowEuler(STEPS)
    states = sampling_states(frozen, sampler.timesteps, sampler, 0)
    settings = half_settings(frozen, precision, states)
    return half_graphs(frozen, settings, lambda bucket: frozen[bucket].example)


def write_graphs(frozen: Sequence[Program], half: HalfGraphs, folder: Path) -> GraphsOnly:
    """The graphs of both modes over one weights file, without golden outputs and ONNX Runtime."""
    with WeightsWriter(folder / "onnx" / WEIGHTS_FILE) as writer:
        graphs = BucketGraphs(
            frozen, folder, writer, half.export, True, False, tensorrt_topk(())
        )
        graphs.write(lambda _: None)
    assert frozen[0].schedule is not None
    buckets = [{"index": b, "onnx": graphs.paths[b]} for b in range(len(frozen))]
    return GraphsOnly(buckets, graphs.rows, frozen[0].schedule.kept_tokens)


def build_all(folder: Path, manifest: Any, capability: str) -> dict[str, Any]:
    """Build every engine of both modes, ``profiles`` in both layouts; bytes and scratch memory of each.

    The ratios are over the smallest static engine.
    """
    plans = {
        "per_bucket": plan_engines(manifest, "per_bucket"),
        **{layout: plan_engines(manifest, "profiles", layout) for layout in LAYOUT_REASONS},
    }
    found = {}
    for name, plan in plans.items():
        engines = []
        for engine in plan.engines:
            start = time.perf_counter()
            built = build_rtx(folder / engine.onnx, capability, engine.bounds())
            engines.append(
                {
                    "name": engine.name,
                    "profiles": len(engine.profiles),
                    "bytes": len(built.data),
                    "activation_bytes": list(built.activation_bytes),
                    "build_seconds": round(time.perf_counter() - start, 2),
                }
            )
        found[name] = {"engines": engines, "bytes": sum(e["bytes"] for e in engines)}
    one = min(engine["bytes"] for engine in found["per_bucket"]["engines"])
    ratios = {f"{name}_over_one_engine": found[name]["bytes"] / one for name in LAYOUT_REASONS}
    return {**found, **ratios}


def calibrated_programs(steps: int = 160, trajectories: int = 64) -> list[Program]:
    """The reference model after a short calibration to 60 % of its MACs on teacher rollouts."""
    config = CompileConfig.model_validate(
        {
            "rollouts": {"trajectories": trajectories},
            "calibration": {"steps": steps, "batch": 16},
        }
    )
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs(2))
    result = dcr.calibrate(routed, budget="60%", config=config, conditions=demo.draw_labels)
    return [graph.program for graph in dcr.freeze(routed, result)]


@torch.no_grad()
def sampled_difference(
    frozen: Sequence[Program], made: HalfGraphs, seeds: Sequence[int] = (0, 1, 2, 3)
) -> dict[str, Any]:
    """Sampling runs of float32 and of half precision from the same noise, each with its own states and tokens.

    Relative L2 of the samples on the way, the largest of a run; one run per seed.
    """
    first, sampler = frozen[0], FlowEuler(STEPS)
    schedule, sample, time_name = first.schedule, first.sample_input, first.timestep_input
    assert schedule is not None
    assert sample is not None
    assert time_name is not None
    halves = [made.rounded_run(bucket) for bucket in range(len(frozen))]
    worst, finite = [], True
    for seed in seeds:
        noise = torch.randn(
            first.example[sample].shape, generator=torch.Generator().manual_seed(seed)
        )
        wide, half, largest = noise, noise, 0.0
        for step, timestep in enumerate(sampler.timesteps):
            bucket = schedule.buckets.index_of(timestep)
            time = torch.full_like(first.example[time_name], timestep)
            given = {**first.example, time_name: time}
            wide = sampler.step(
                run_flat(frozen[bucket], {**given, sample: wide})[0], step, wide
            )
            half = sampler.step(halves[bucket].outputs({**given, sample: half})[0], step, half)
            largest = max(largest, float((half - wide).norm() / wide.norm()))
            finite = finite and bool(torch.isfinite(half).all())
        worst.append(largest)
    return {"seeds": list(seeds), "rel_l2": worst, "finite": finite}


def half_figures(frozen: Sequence[Program], half: HalfGraphs) -> dict[str, Any]:
    """What half precision costs, with the tokens that float32 chose and left to itself."""
    return {
        "states": half.states,
        "steps": STEPS,
        "worst_rel_l2_same_tokens": max(row.rel_l2 for row in half.rows),
        "non_finite": sum(row.non_finite for row in half.rows),
        "swapped_tokens": half.swapped,
        "float32_islands": list(half.islands),
        "samples": sampled_difference(frozen, half),
    }


def spanning_scratch(
    model: nn.Module, inputs: dict[str, Tensor], kept: Sequence[int], capability: str = "SM86"
) -> int:
    """Scratch memory of a float16 engine with one profile over timestep buckets of so many kept tokens each."""
    routed = dcr.route(model, inputs)
    schedule = TokenSchedule(
        {spec.name: tuple(kept) for spec in routed.program.blocks},
        {spec.name: spec.num_tokens for spec in routed.program.blocks},
        TimestepBuckets.even(len(kept)),
    )
    frozen = [graph.program for graph in dcr.freeze(routed, schedule=schedule)]
    (group,) = group_buckets(schedule, None)
    opened = open_program(frozen[0], group, None)
    half = compute_in_half(exported_program(opened), opened)
    data = graph_from_exported(half, opened)[0].SerializeToString()
    row = {
        "onnx": "profiles.onnx",
        "buckets": list(range(len(kept))),
        "kept_inputs": {input_name(block): block for block in group.kept},
    }
    plan = plan_engines(GraphsOnly([], [row], schedule.kept_tokens), "profiles", "spanning")
    (scratch,) = build_rtx(data, capability, plan.engines[0].bounds()).activation_bytes
    return scratch


def attention_scratch(capability: str = "SM86") -> dict[str, Any]:
    """Scratch memory of one large graph in each type: TensorRT fuses no attention in float32."""
    torch.manual_seed(0)
    model = new_reference_dit(LARGE_SIZE).eval()
    inputs = {
        **demo.example_inputs(1),
        "hidden_states": torch.randn(1, 1, LARGE_SIZE, LARGE_SIZE),
    }
    program = dcr.freeze(dcr.route(model, inputs), keep_ratio=8 / 9)[0].program
    exported = exported_program(program)
    kept = round(8 / 9 * LARGE_TOKENS)
    found: dict[str, Any] = {
        "tokens": LARGE_TOKENS,
        "kept_tokens": kept,
        "heads": HEADS,
        "batch": 1,
    }
    for name, made, size in (
        ("fp16", compute_in_half(exported, program), 2),
        ("bf16", compute_in_half(exported, program, precision="bf16"), 2),
        ("fp32", exported, 4),
    ):
        model_proto = graph_from_exported(made, program, bfloat16=name == "bf16")[0]
        data = model_proto.SerializeToString()
        found[name] = {
            "activation_bytes": build_rtx(data, capability).activation_bytes[0],
            "one_score_matrix_bytes": HEADS * kept * kept * size,
        }
    found["fp16_spanning"] = {
        "kept_tokens": [kept, kept // 2, kept // 4],
        "activation_bytes": spanning_scratch(
            model, inputs, (kept, kept // 2, kept // 4), capability
        ),
    }
    return found


def wide_engines(folder: Path, capability: str = "SM86") -> dict[str, Any]:
    """The same for a model whose weights outweigh its kernels: width 384, untrained."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_layers": len(KEPT)}
    model = DiTTransformer2DModel(**{**REFERENCE_CONFIG, **heads}).eval()
    parameters = sum(p.numel() for p in model.parameters())
    frozen = frozen_programs(model, demo.example_inputs(2))
    manifest = write_graphs(frozen, half_along_a_run(frozen), folder)
    weights = (folder / "onnx" / WEIGHTS_FILE).stat().st_size
    return {
        "parameters": parameters,
        "weights_bytes": weights,
        "engines": {capability: build_all(folder, manifest, capability)},
    }


def measure_engines(folder: Path) -> dict[str, Any]:
    """Bytes and scratch memory."""
    frozen = frozen_programs(demo.load_reference_dit(), demo.example_inputs(2))
    graphs = write_graphs(frozen, half_along_a_run(frozen), folder / "reference")
    return {
        "model": "reference DiT, 2.8 M parameters, 256 tokens, batch 2",
        "kept_tokens": [list(row) for row in KEPT],
        "weights_bytes": (folder / "reference/onnx" / WEIGHTS_FILE).stat().st_size,
        "engines": {
            name: build_all(folder / "reference", graphs, name) for name in CAPABILITIES
        },
        "attention": attention_scratch(),
        "wide_model": wide_engines(folder / "wide"),
    }


def measure_accuracy() -> dict[str, Any]:
    """How far float16 is from float32."""
    frozen = frozen_programs(demo.load_reference_dit(), demo.example_inputs(2))
    calibrated = calibrated_programs()
    return {
        "float16": half_figures(frozen, half_along_a_run(frozen)),
        "float16_calibrated": half_figures(calibrated, half_along_a_run(calibrated)),
    }


def measure_bfloat16(folder: Path) -> dict[str, Any]:
    """How far bfloat16 is from float32, and what its engines weigh."""
    calibrated = calibrated_programs()
    frozen = frozen_programs(demo.load_reference_dit(), demo.example_inputs(2))
    made = half_along_a_run(frozen, "bf16")
    graphs = write_graphs(frozen, made, folder)
    found = {
        "calibrated": half_figures(calibrated, half_along_a_run(calibrated, "bf16")),
        "untrained": half_figures(frozen, made),
        "weights_bytes": (folder / "onnx" / WEIGHTS_FILE).stat().st_size,
        "engines": {name: build_all(folder, graphs, name) for name in CAPABILITIES},
    }
    return {"bfloat16": found, "attention": attention_scratch()}


def measure_int8(folder: Path) -> dict[str, Any]:
    """How far int8 is from float32 with the tokens that float32 chose, and what its engines weigh; needs ModelOpt."""
    frozen = frozen_programs(demo.load_reference_dit(), demo.example_inputs(2))
    made = half_along_a_run(frozen, "int8")
    graphs = write_graphs(frozen, made, folder)
    found = {
        "layers": len(made.int8 or ()),
        "states": made.states,
        "rel_l2_same_tokens": [row.rel_l2 for row in made.rows],
        "non_finite": sum(row.non_finite for row in made.rows),
        "swapped_tokens": made.swapped,
        "run_rel_l2_same_tokens": run_with_same_tokens(frozen, made),
        "weights_bytes": (folder / "onnx" / WEIGHTS_FILE).stat().st_size,
        "engines": {name: build_all(folder, graphs, name) for name in CAPABILITIES},
        "modelopt": importlib.metadata.version("nvidia-modelopt"),
    }
    return {"int8": found}


@torch.no_grad()
def run_with_same_tokens(frozen: Sequence[Program], made: HalfGraphs) -> float:
    """Largest relative L2 on the way of a sampling run with its own states and with float32's tokens.

    The noise is not that of the run whose states were looked at.
    """
    first, sampler = frozen[0], FlowEuler(STEPS)
    schedule, sample, time_name = first.schedule, first.sample_input, first.timestep_input
    assert schedule is not None
    assert sample is not None
    assert time_name is not None
    wides = [Ranges(exported_program(program), program) for program in frozen]
    narrows = [made.rounded_run(bucket) for bucket in range(len(frozen))]
    noise = torch.randn(
        first.example[sample].shape, generator=torch.Generator().manual_seed(1)
    )
    wide, narrow, largest = noise, noise, 0.0
    for step, timestep in enumerate(sampler.timesteps):
        bucket = schedule.buckets.index_of(timestep)
        time = torch.full_like(first.example[time_name], timestep)
        given = {**first.example, time_name: time}
        velocity = wides[bucket].outputs({**given, sample: wide})[0]
        chosen = wides[bucket].chosen
        other = narrows[bucket].outputs_with({**given, sample: narrow}, chosen)[0]
        wide = sampler.step(velocity, step, wide)
        narrow = sampler.step(other, step, narrow)
        largest = max(largest, float((narrow - wide).norm() / wide.norm()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        choices=("engines", "accuracy", "bfloat16", "int8"),
        help="the other figures stay as they are; int8 needs the extra int8",
    )
    only = parser.parse_args().only
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if only else {}
    with tempfile.TemporaryDirectory() as folder:
        if only in (None, "engines"):
            record |= measure_engines(Path(folder))
        if only in (None, "accuracy"):
            record |= measure_accuracy()
        if only in (None, "bfloat16"):
            record |= measure_bfloat16(Path(folder) / "bfloat16")
        if only in (None, "int8"):
            record |= measure_int8(Path(folder) / "int8")
    record["environment"] = {
        **environment(),
        "tensorrt_rtx": importlib.metadata.version("tensorrt_rtx_cu12"),
    }
    write_json_atomic(RESULTS, record)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
