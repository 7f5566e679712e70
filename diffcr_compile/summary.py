"""What a compilation reached, as the dict behind ``report.json``; its keys are stable."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffcr_compile.budgets import table_facts
from diffcr_compile.config import CompileConfig, RolloutConfig
from diffcr_compile.schedule import UNITS, CostTable, TokenSchedule, cost_of
from diffcr_compile.verdict import SPEED_CHECK, commands, decide, stability

if TYPE_CHECKING:
    from diffcr_compile.resumable import Compiled

_Value = TypeVar("_Value")
# Small enough that nobody sees the difference, large enough for a solver over whole tokens.
BUDGET_SLACK = 0.01
# Blocks alone and in the model differ by caches and scheduling; beyond this the table is doubtful.
TABLE_SLACK = 0.1
_PACKAGES = (
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "diffcr-compile",
)


def build_report(
    compiled: Compiled,
    config: CompileConfig,
    speed: Mapping[str, Any],
    quality: Mapping[str, Any] | None,
    folder: Path,
    timesteps: Sequence[float],
    drift: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report, without seconds and memory, which the workspace adds.

    Args:
        compiled: what was made.
        config: settings.
        speed: what was measured of it.
        quality: what `evaluate` said, if it was asked.
        folder: of the artifact.
        timesteps: of a sampling run, in its order: from noise to picture.
        drift: from :func:`trajectory_drift`.
    """
    schedule, costs = compiled.frozen[0].schedule, compiled.costs
    assert schedule is not None
    macs = cost_of(costs, schedule) / costs.dense
    reached = macs if schedule.metric == "macs" else schedule.reached
    assert reached is not None
    unit = UNITS[schedule.metric]
    units = {spec.name: spec.members for spec in compiled.routed.blocks}
    size = measure_size(folder)
    parity = parity_section(compiled)
    report: dict[str, Any] = {
        "schema_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "title": f"{compiled.name} at {schedule.asked:.0%} of its {unit}",
        "model": model_section(compiled),
        "budget": {
            "metric": schedule.metric,
            "asked": schedule.asked,
            "reached": reached,
            "macs": macs,
            "table": table_facts(config.budget),
        },
        "speedup": {"macs_implied": 1 / macs, **speed, "stability": stability(speed)},
        "parity": parity,
        "size": size,
        "quality": quality,
        "schedule": _per_block(units, {u: list(k) for u, k in schedule.kept_tokens.items()}),
        "units": {unit: list(members) for unit, members in units.items()},
        "timestep_buckets": schedule.buckets.ranges(),
        "noisiest_first": list(dict.fromkeys(map(schedule.buckets.index_of, timesteps))),
        "num_tokens": _per_block(units, schedule.num_tokens),
        "learned_keep_ratios": {
            name: [round(float(r), 4) for r in row]
            for name, row in zip(
                compiled.result.keep_ratios.blocks,
                compiled.result.keep_ratios.values,
                strict=True,
            )
        },
        "macs": macs_section(costs, schedule, macs),
        "calibration": {
            "history": list(compiled.result.history),
            "settings": config.model_dump(),
            "router_explains": compiled.result.explained,
        },
        "environment": environment(),
        "commands": commands(config, folder),
        "drift": drift,
        "warnings": [
            *warnings_section(schedule, reached, table_facts(config.budget)),
            *steps_warning(config.rollouts),
        ],
    }
    if not compiled.manifest.runs_on_cpu:
        report["warnings"].append(
            "Speed, drift and quality were not measured: ONNX Runtime's CPU has no bfloat16 kernels. Measure them on "
            "the device."
        )
    report["checks"] = checks_section(report)
    report["checks"], report["verdict"] = decide(report)
    pictures = ("samples_dense", "samples_compressed", "importance")
    found = {n: f"{n}.png" for n in pictures if (folder / f"report/{n}.png").exists()}
    report["pictures"] = found or None
    return report


def steps_warning(rollouts: RolloutConfig) -> list[str]:
    """What distilled steps ask of whoever samples, and do to comparisons with the dense model."""
    if rollouts.substeps == 1:
        return []
    said = (
        f"Learned for sampling in {rollouts.steps} steps, each of which stands for {rollouts.substeps} of the dense model's "
        "(rollouts.substeps): with another number of steps it is off, and what it differs from the dense model in as "
        "many steps, such as drift and PSNR, is no error."
    )
    return [said]


def _per_block(
    units: Mapping[str, Sequence[str]], of_unit: Mapping[str, _Value]
) -> dict[str, _Value]:
    """A value for every block of the model; the blocks of a span have that of the span."""
    return {block: of_unit[unit] for unit, members in units.items() for block in members}


def model_section(compiled: Compiled) -> dict[str, Any]:
    dense = compiled.dense
    return {
        "name": compiled.name,
        "parameters": sum(p.numel() for p in dense.module.parameters()),
        "num_tokens": max(spec.num_tokens for spec in dense.blocks),
        "routed_blocks": len(dense.blocks),
        "refused_blocks": [dataclasses.asdict(refusal) for refusal in dense.refused],
    }


def parity_section(compiled: Compiled) -> dict[str, Any]:
    onnx = [rung for rung in compiled.ladder if rung.step.startswith("FROZEN")]
    return {
        "routed_all_kept_bit_equal": compiled.ladder[0].max_abs == 0.0,
        "onnx_max_abs": max(rung.max_abs for rung in onnx),
        "onnx_rel_l2": max(rung.rel_l2 for rung in onnx),
        "ladder": [dataclasses.asdict(rung) for rung in compiled.ladder],
    }


def measure_size(folder: Path) -> dict[str, int]:
    """Bytes of everything in onnx/, of its weights, and of one dense ONNX export."""
    files = [path for path in (folder / "onnx").iterdir() if path.is_file()]
    return {
        "onnx_bytes": sum(path.stat().st_size for path in files),
        "dense_onnx_bytes": (folder / "baseline/dense.onnx").stat().st_size,
        "weights_bytes": sum(p.stat().st_size for p in files if p.suffix == ".bin"),
    }


def macs_section(costs: CostTable, schedule: TokenSchedule, reached: float) -> dict[str, Any]:
    per_block = {}
    for block, kept in schedule.kept_tokens.items():
        at = [costs.levels[block].index(k) for k in kept]
        routing = [costs.routing[block][i] for i in at]
        per_block[block] = {
            "dense": round(costs.per_level[block][-1]),
            "kept": [
                round(costs.per_level[block][i] - r) for i, r in zip(at, routing, strict=True)
            ],
            "routing": [round(r) for r in routing],
            "moved_bytes": [round(costs.moved_bytes[block][i]) for i in at],
            "break_even": _break_even(costs, block),
        }
    return {
        "dense": round(costs.dense),
        "compressed_mean": round(costs.dense * reached),
        "outer": round(costs.outer),
        "per_block": per_block,
    }


def _break_even(costs: CostTable, block: str) -> float | None:
    """The largest keep ratio at which the routed block costs less than the dense one, router included."""
    levels, macs = costs.levels[block], costs.per_level[block]
    below = [
        kept for kept, cost in zip(levels[:-1], macs[:-1], strict=True) if cost < macs[-1]
    ]
    return max(below) / levels[-1] if below else None


def checks_section(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    budget, parity, speedup, size = (
        report[k] for k in ("budget", "parity", "speedup", "size")
    )
    buckets = len(report["timestep_buckets"])
    return [
        {
            "name": "budget",
            "passed": budget["asked"] * (1 - BUDGET_SLACK)
            <= budget["reached"]
            <= budget["asked"],
            "found": f"{budget['reached']:.2%}",
            "expected": f"at most {budget['asked']:.2%}, and no more than 1 % below",
        },
        {
            "name": "all tokens kept is the dense model",
            "passed": parity["routed_all_kept_bit_equal"],
            "found": "bit-equal" if parity["routed_all_kept_bit_equal"] else "different",
            "expected": "bit-equal",
        },
        _parity_check(parity["ladder"]),
        *_speed_check(speedup, budget),
        {
            "name": f"size of {buckets} buckets",
            "passed": size["onnx_bytes"] <= 1.05 * size["dense_onnx_bytes"],
            "found": f"{size['onnx_bytes'] / size['dense_onnx_bytes']:.3f} x one dense export",
            "expected": "at most 1.05 x",
        },
    ]


def _parity_check(rungs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rung that is nearest to its tolerance, or furthest beyond it."""
    words = {"max_abs": "largest difference", "rel_l2": "relative L2"}

    def used(rung: Mapping[str, Any]) -> float:
        error = float(rung[rung["measure"]])
        return error / rung["tolerance"] if rung["tolerance"] else error and math.inf

    worst = max(rungs, key=lambda rung: (not rung["passed"], used(rung)))
    return {
        "name": "parity of every step",
        "passed": all(rung["passed"] for rung in rungs),
        "found": f"{words[worst['measure']]} {worst[worst['measure']]:.1e}",
        "expected": f"at most {worst['tolerance']:.0e} ({worst['step']})",
    }


def _speed_check(
    speedup: Mapping[str, Any], budget: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """None where no speed was measured."""
    found = speedup["onnxruntime_cpu_loop"]
    if found is None:
        return []
    return [
        {
            "name": SPEED_CHECK,
            "passed": found >= 1 / budget["asked"],
            "found": f"{found:.2f} x",
            "expected": f"at least {1 / budget['asked']:.2f} x",
        }
    ]


def warnings_section(
    schedule: TokenSchedule, reached: float, table: Mapping[str, Any] | None = None
) -> list[str]:
    found = []
    if table and abs(table["check"]) > TABLE_SLACK:
        found.append(
            f"The measured blocks do not add up: the whole model took {1 + table['check']:.0%} of what the "
            "latency table predicts for it."
        )
    if table and table["non_monotone"]:
        done = "smoothed" if table["fit"] == "isotonic" else "taken as they are"
        found.append(
            f"Fewer tokens took longer somewhere in {len(table['non_monotone'])} blocks, such as "
            f"{table['non_monotone'][0]}; the measured times were {done}."
        )
    columns = {tuple(schedule.column(i).values()) for i in range(len(schedule.buckets))}
    if len(columns) == 1:
        found.append(
            "Every timestep bucket has the same schedule: the timesteps made no difference."
        )
    if schedule.asked and reached < schedule.asked * (1 - BUDGET_SLACK):
        found.append(
            f"{reached:.1%} of the {UNITS[schedule.metric]} was reached where {schedule.asked:.1%} was allowed."
        )
    return found


def environment() -> dict[str, str]:
    """Versions that the result depends on, as far as they are installed."""
    found = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
