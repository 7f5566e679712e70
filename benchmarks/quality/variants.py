"""Every variant as a denoiser: a function of sample, timestep and labels, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffcr_compile as dcr
from benchmarks.quality import merging, paper, reuse, tuned
from benchmarks.quality.job import Job
from benchmarks.quality.settings import ROUTED, Scale, config
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.program import DiTGraph
from diffcr_compile.reference import demo
from diffcr_compile.schedule import CostTable, TokenSchedule

# (x (B, 1, 32, 32), timestep in (0, 1000], labels (B,)) -> velocity like x
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


def build(job: Job, scale: Scale, work: Path, data: Path) -> Built:
    """Calibrate, or set up, one variant."""
    budget, seed = job.budget, job.seed
    if job.variant in ROUTED:
        return _routed(job, scale, teacher_states(scale, work))
    makers: dict[str, Callable[[], Built]] = {
        "dense": dense,
        "dense, fewer steps": lambda: fewer_steps(budget),
        "dense, fine-tuned": lambda: tuned.build(seed, scale, data),
        "paper's recipe": lambda: paper.build(budget, seed, scale, data),
        "tokens merged (2-D ToMe)": lambda: merging.build(budget, seed),
        "steps reuse blocks": lambda: reuse.build(budget),
    }
    return makers[job.variant]()


def teacher_states(scale: Scale, work: Path) -> TeacherStates:
    """One set of rollouts of the dense model for all variants and seeds."""
    settings = config("ours", 0, scale)
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs())
    folder = work / f"rollouts_{settings.rollouts.trajectories}_{settings.rollouts.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    sampler = dcr.FlowEuler(settings.rollouts.steps)
    return roll_out(routed.program, sampler, settings.rollouts, demo.draw_labels, 0, folder)


def dense() -> Built:
    """The model as it is."""
    return Built(plain(demo.load_reference_dit()))


def fewer_steps(budget: float) -> Built:
    """The dense model with as many steps as the budget pays for, rounded down."""
    return dataclasses.replace(dense(), steps=lambda n: max(1, int(budget * n + 1e-9)))


def plain(model: torch.nn.Module) -> Denoise:
    """The model's own call as a denoiser."""

    def denoise(x: Tensor, timestep: float, labels: Tensor) -> Tensor:
        velocity: Tensor = model(
            hidden_states=x, timestep=torch.full((len(x),), timestep), class_labels=labels
        ).sample
        return velocity

    return denoise


def of_graphs(graphs: tuple[DiTGraph, ...]) -> Denoise:
    """FROZEN graphs as a denoiser; the bucket is chosen by timestep value."""
    schedule = graphs[0].program.schedule
    assert schedule is not None
    calls = [plain(graph) for graph in graphs]
    return lambda x, t, labels: calls[schedule.buckets.index_of(t)](x, t, labels)


def _routed(job: Job, scale: Scale, states: TeacherStates) -> Built:
    settings = config(job.variant, job.seed, scale)
    model, example = demo.load_reference_dit(), demo.example_inputs()
    routed = dcr.route(model, example, settings.routing, job.seed)
    result = dcr.calibrate(routed, states, budget=job.budget, config=settings)
    schedule, costs = result.schedule, result.costs
    tail = [record["loss"] for record in result.history[-20:]]
    return Built(
        of_graphs(dcr.freeze(routed, result)),
        lambda steps: share_of(schedule, costs, steps),
        facts={
            "schedule": {block: list(kept) for block, kept in schedule.kept_tokens.items()},
            "final_distillation_loss": sum(tail) / len(tail) if tail else None,
        },
    )
