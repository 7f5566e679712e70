"""Samplers that the teacher rolls out with."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from diffcr_compile.errors import UsageError


class Sampler(Protocol):
    """What a rollout needs: the timesteps, and one step from one to the next."""

    timesteps: list[float]  # values of the model's timestep input, in sampling order

    def start(self, noise: Tensor) -> Tensor:
        """The first state, from standard normal noise."""

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        """The next state from the model's output at ``timesteps[index]``."""


class FlowEuler:
    """Euler steps for flow matching: x_t = (1 - t) x + t noise, the model predicts noise - x.

    Args:
        steps: equal steps from t = 1 to t = 0.
        scale: the model is called with ``timestep = scale * t``.
    """

    def __init__(self, steps: int, scale: float = 1000.0) -> None:
        self.steps = steps
        self.timesteps = [scale * (1 - i / steps) for i in range(steps)]

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        if output.shape != state.shape:
            raise UsageError(
                f"the model's output {tuple(output.shape)} is no velocity of its sample "
                f"{tuple(state.shape)}, so it cannot be rolled out; pass data=dcr.LatentStates(...), or a "
                "sampler of your own",
                code="DCR-U062",
            )
        return state - output / self.steps


class SchedulerSampler:
    """A diffusers scheduler (DDIM, DPM-Solver, flow matching, ...), deterministic ones only.

    Args:
        scheduler: any object with the scheduler interface of diffusers.
        steps: inference steps.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.scheduler = scheduler
        self.steps = steps
        scheduler.set_timesteps(steps)
        self.timesteps = [float(t) for t in scheduler.timesteps]

    def start(self, noise: Tensor) -> Tensor:
        self.scheduler.set_timesteps(self.steps)  # schedulers with history start afresh
        sigma = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return noise * sigma

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        output = output[:, : state.shape[1]]  # a learned variance is the sampler's affair
        moved = self.scheduler.step(output, self.scheduler.timesteps[index], state)
        result: Tensor = moved.prev_sample
        return result


def timestep_like(example: Tensor, value: float, batch: int) -> Tensor:
    """`value` in the dtype and form of the model's timestep input."""
    if example.ndim == 0:
        return torch.tensor(value, dtype=example.dtype, device=example.device)
    return torch.full((batch, *example.shape[1:]), value).to(example.device, example.dtype)
