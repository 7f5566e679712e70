"""Recommendations of ``inspect``: plain rules over a plan, each with the figure it rests on."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from diffcr_compile.config import CompileConfig
from diffcr_compile.fast_bfloat16 import fast_bfloat16
from diffcr_compile.planning.targets import ROUTING_OPS
from diffcr_compile.shortcut import macs_per_token

if TYPE_CHECKING:
    from diffcr_compile.planning.inspection import Plan

# A block that must keep fewer tokens than this to gain anything is better left alone or shared.
POOR_BREAK_EVEN = 0.8
GIGABYTE = 1_000_000_000


def advise(
    plan: Plan, dtypes: Collection[str], config: CompileConfig, devices: Collection[str] = ()
) -> tuple[str, ...]:
    """What to do, most important first.

    Args:
        plan: without recommendations.
        dtypes: floating types of the model's weights.
        config: of the compilation that is planned.
        devices: types of those that the model lies on, on which it would be trained.
    """
    return (
        *_can_it_run(plan),
        *_limits(plan, dtypes, config),
        *_is_it_worth_it(plan),
        *_does_it_learn(plan, config),
        *_does_it_fit(plan, config),
        *_does_it_last(config, devices),
    )


def _can_it_run(plan: Plan) -> Iterator[str]:
    if plan.error:
        yield "the model cannot be compiled until this is cured: " + plan.error.splitlines()[0]
    if not plan.details:
        yield "no block can be routed, so there is nothing to gain"
    if plan.on_meta:
        yield "the model is on the meta device: load its weights before compiling"
    smallest = plan.smallest_budget
    if smallest is not None and smallest > 0.6:
        outside = plan.costs.outer / plan.costs.dense if plan.costs else 0.0
        yield (
            f"no budget below {smallest:.1%} can be reached: {outside:.1%} of the MACs are outside the "
            "routable blocks"
        )


def _limits(plan: Plan, dtypes: Collection[str], config: CompileConfig) -> Iterator[str]:
    target = plan.target
    for op, why in target.troubles(plan.ops).items():
        yield f"{op} runs {plan.ops[op]} times per forward; on {target.name}: {why}"
    unknown = target.unknown_ops(ROUTING_OPS)
    if unknown:
        yield f"{target.runtime} is not known to read {', '.join(unknown)}, which routing adds"
    if target.max_topk is not None:
        yield from _top_k(plan, target.max_topk)
    if "bfloat16" in dtypes:
        yield (
            "a model in bfloat16 cannot be exported at opset 20: give it in float32 (model.float()) and set "
            "export.precision: bf16, which has its products in bfloat16"
        )
    elif (
        target.fused_attention and dtypes == {"float32"} and config.export.precision == "fp32"
    ):
        yield (
            f"float32 attention keeps the whole score matrix on {target.runtime}: set export.precision "
            "to fp16 or bf16"
        )


def _top_k(plan: Plan, most: int) -> Iterator[str]:
    large = [block for block in plan.details if block.spec.num_tokens > most]
    if not large:
        return
    tokens = max(block.spec.num_tokens for block in large)
    ratio = most / tokens
    yield (
        f"{plan.target.runtime} builds no TopK of K > {most}, and {len(large)} blocks have up to {tokens} "
        f"tokens: keep ratios between {ratio:.3f} and 1 need a graph for this target; "
        f"--set 'export.target=[\"{plan.target.name}\"]'"
    )


def _is_it_worth_it(plan: Plan) -> Iterator[str]:
    poor, never = [], []
    for block in plan.details:
        if block.overhead is None:
            continue
        if block.overhead.break_even is None:
            never.append(block.spec.name)
        elif block.overhead.break_even < POOR_BREAK_EVEN:
            poor.append(block.overhead.break_even)
    if never:
        yield f"routing never pays in {_some(never)}: too little work per token moved"
    if poor:
        yield (
            f"{len(poor)} blocks gain only below keep ratio {min(poor):.2f} at {plan.macs_per_byte:g} "
            "MACs per byte moved: let blocks share their tokens with --set routing.share_index=2"
        )
    share = sum(block.share or 0.0 for block in plan.refusals)
    if plan.details and share > 0.05:
        yield f"{share:.0%} of the MACs are in refused blocks and stay"


def _does_it_learn(plan: Plan, config: CompileConfig) -> Iterator[str]:
    calibration = config.calibration
    held = calibration.steps == 0 or calibration.train in ("ratio", "router")
    if plan.details and held and config.routing.shortcut_rank == 0:
        yield (
            "with these settings the model's own weights learn nothing, and tokens that bypass a block are missed most: "
            "--set routing.shortcut_rank=16 gives them a fitted linear map, for about "
            f"{_share_of_shortcuts(plan, 16):.1%} of the MACs"
        )


def _share_of_shortcuts(plan: Plan, rank: int) -> float:
    """MACs of shortcuts in every block, of the dense model's."""
    macs = sum(macs_per_token(b.spec.width, rank) * b.spec.num_tokens for b in plan.details)
    return macs / plan.costs.dense if plan.costs else 0.0


def _does_it_fit(plan: Plan, config: CompileConfig) -> Iterator[str]:
    if plan.estimates is None or not plan.details:
        return
    memory = installed_memory()
    needed, least = plan.estimates.calibrate, plan.estimates.calibrate_routers
    if memory is not None and needed > memory:
        if least < needed and least <= memory:
            advice = "--set calibration.train=router"
        else:
            advice = (
                "--set calibration.batch, rollouts.trajectories and calibration.train to less"
            )
        yield (
            f"calibration may take {needed / GIGABYTE:.1f} GB of memory, this machine has "
            f"{memory / GIGABYTE:.1f}: {advice}"
        )
    rollouts = plan.estimates.rollouts
    if rollouts > 2 * GIGABYTE:
        states = config.rollouts.trajectories * config.rollouts.steps
        yield (
            f"teacher rollouts take {rollouts / GIGABYTE:.1f} GB ({states:,} states of "
            f"{rollouts / states / 1e6:.2f} MB): --set rollouts.trajectories to less than "
            f"{config.rollouts.trajectories}"
        )


def _does_it_last(config: CompileConfig, devices: Collection[str]) -> Iterator[str]:
    wanted = config.calibration.precision == "bf16" and config.calibration.steps > 0
    if wanted and "cpu" in devices and not fast_bfloat16("cpu"):
        yield (
            "this CPU has no bfloat16 instructions, so that training steps take many times as long as in "
            "float32: --set calibration.precision=fp32, or move the model to a GPU"
        )


def suggested_budget(smallest: float | None) -> float | None:
    """60% where that can be reached, else the next multiple of 5% with some room to choose."""
    if smallest is None:
        return None
    return min(1.0, max(0.6, math.ceil(round((smallest + 0.05) * 20, 6)) / 20))


def installed_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _some(names: Sequence[str]) -> str:
    return (
        ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more blocks"
    )
