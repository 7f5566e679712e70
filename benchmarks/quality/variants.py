"""Every variant as a denoiser: a function of sample, timestep and labels, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffcr_compile as dcr
from benchmarks.quality import merging, paper, reuse, tuned
from benchmarks.quality.case import Case
from benchmarks.quality.settings import DISTILLED, ROUTED, config
from benchmarks.quality.states import teacher_states
from diffcr_compile.program import DiTGraph
from diffcr_compile.schedule import CostTable, TokenSchedule

# (sample and condition (B, 1 + c, 32, 32), timestep in (0, 1000], labels (B,)) -> velocity (B, 1, 32, 32)
Denoise = Callable[[Tensor, float, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Built:
    """A variant that is ready to sample.

    Attributes:
        denoise: one call of the model.
        share: MACs of a call, as a share of the dense model's, averaged over a loop of n steps.
        steps: sampling steps that it may take where the dense model takes n.
        facts: anything that the table should say about it.
        start: called with n before each loop, for variants with a memory.
    """

    denoise: Denoise
    share: Callable[[int], float] = lambda n: 1.0
    steps: Callable[[int], int] = lambda n: n
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: Callable[[int], None] = lambda n: None


def timesteps(steps: int) -> list[float]:
    """Values of the timestep input in a loop of Euler steps."""
    return [1000 * (1 - step / steps) for step in range(steps)]


def share_of(schedule: TokenSchedule, costs: CostTable, steps: int) -> float:
    """MACs of a schedule over a loop of `steps` steps, as a share of the dense model's."""
    columns = [schedule.column(schedule.buckets.index_of(t)) for t in timesteps(steps)]
    macs = [costs.outer + sum(costs.at(b, k) for b, k in c.items()) for c in columns]
    return sum(macs) / len(macs) / costs.dense


def build(case: Case) -> Built:
    """Calibrate, or set up, one variant."""
    makers: dict[str, Callable[[Case], Built]] = {
        "dense": dense,
        "dense, fewer steps": fewer_steps,
        "dense, fine-tuned": tuned.build,
        f"dense{DISTILLED}": tuned.build,
        "paper's recipe": paper.build,
        "tokens merged (2-D ToMe)": merging.build,
        "steps reuse blocks": reuse.build,
    }
    return makers.get(case.job.variant, _routed)(case)


def dense(case: Case) -> Built:
    """The model as it is."""
    return Built(plain(case.model()))


def fewer_steps(case: Case) -> Built:
    """The dense model with as many steps as the budget pays for, rounded down."""
    budget = case.job.budget
    return dataclasses.replace(dense(case), steps=lambda n: max(1, int(budget * n + 1e-9)))


def plain(model: torch.nn.Module) -> Denoise:
    """The model's own call as a denoiser."""

    def denoise(x: Tensor, timestep: float, labels: Tensor) -> Tensor:
        velocity: Tensor = model(
            hidden_states=x,
            timestep=torch.full((len(x),), timestep, device=x.device),
            class_labels=labels,
        ).sample
        return velocity

    return denoise


def of_graphs(graphs: tuple[DiTGraph, ...]) -> Denoise:
    """FROZEN graphs as a denoiser; the bucket is chosen by timestep value."""
    schedule = graphs[0].program.schedule
    assert schedule is not None
    calls = [plain(graph) for graph in graphs]
    return lambda x, t, labels: calls[schedule.buckets.index_of(t)](x, t, labels)


def _routed(case: Case) -> Built:
    job = case.job
    assert job.variant in ROUTED, job.variant
    settings = config(job.variant, job.seed, case.scale)
    routed = case.routed(settings.routing)
    result = dcr.calibrate(routed, teacher_states(case), budget=job.budget, config=settings)
    schedule, costs = result.schedule, result.costs
    tail = [record["loss"] for record in result.history[-20:]]
    return Built(
        of_graphs(dcr.freeze(routed, result)),
        lambda steps: share_of(schedule, costs, steps),
        facts={
            "schedule": {block: list(kept) for block, kept in schedule.kept_tokens.items()},
            "final_loss": sum(tail) / len(tail) if tail else None,
        },
    )
