"""Samplers that the teacher rolls out with."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffcr_compile.errors import UsageError
from diffcr_compile.tensor_bytes import tensor_bytes

SLACK = 0.1  # of a step, by which a finer schedule may miss a timestep
SAME_LEVEL = 1e-3


class Sampler(Protocol):
    """What a rollout needs: the timesteps, and one step from one to the next.

    It may have more: ``model_input(index, state)``, see :func:`model_input`, and ``refined(substeps)``.
    """

    timesteps: list[float]  # values of the model's timestep input, in sampling order

    def start(self, noise: Tensor) -> Tensor:
        """The first state, from standard normal noise."""

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        """The next state from the model's output at ``timesteps[index]``."""


def model_input(sampler: Sampler, index: int, state: Tensor) -> Tensor:
    """What the model is given at ``timesteps[index]``.

    The state itself, but for samplers that keep it on another scale and have a method of this name, with the arguments
    `index` and `state`.
    """
    scale = getattr(sampler, "model_input", None)
    if scale is None:
        return state
    scaled: Tensor = scale(index, state)
    return scaled


def sampler_identity(sampler: Sampler) -> Any:
    """What tells samplers apart without running them: class, timesteps, a scheduler's settings, and attributes.

    Of attributes numbers, text, tensors and what is made of these count; of anything else its class.
    """
    scheduler = scheduler_identity(getattr(sampler, "scheduler", None))
    own = {n: v for n, v in getattr(sampler, "__dict__", {}).items() if n != "scheduler"}
    timesteps = list(map(float, sampler.timesteps))
    return [type(sampler).__qualname__, timesteps, scheduler, _plain(own)]


def _plain(value: Any) -> Any:
    """A value in the form of JSON, tensors by their digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        content = tensor_bytes(value) if isinstance(value, Tensor) else value.tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name]) for name in sorted(value, key=str)}
    return type(value).__qualname__


def scheduler_identity(scheduler: Any) -> Any:
    """Class and settings of a diffusers scheduler; None of none."""
    if scheduler is None:
        return None
    # what begins with _ is diffusers' own, and in another order in every process
    config = {
        name: value
        for name, value in dict(getattr(scheduler, "config", {})).items()
        if not name.startswith("_")
    }
    return [type(scheduler).__name__, json.dumps(config, default=repr, sort_keys=True)]


class FlowEuler:
    """Euler steps for flow matching: x_t = (1 - t) x + t noise, the model predicts noise - x.

    Args:
        steps: equal steps from t = 1 to t = 0.
        scale: the model is called with ``timestep = scale * t``.
    """

    def __init__(self, steps: int, scale: float = 1000.0) -> None:
        self.steps, self.scale = steps, scale
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

    def refined(self, substeps: int) -> FlowEuler:
        """The same sampler with `substeps` steps for each one."""
        return FlowEuler(self.steps * substeps, self.scale)


class SchedulerSampler:
    """A diffusers scheduler (DDIM, DPM-Solver, flow matching, ...), deterministic ones only.

    Args:
        scheduler: any object with the scheduler interface of diffusers.
        steps: inference steps.

    Raises:
        UsageError: the scheduler draws noise of its own in a step.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.scheduler = scheduler
        self.steps = steps
        scheduler.set_timesteps(steps)
        self.timesteps = [float(t) for t in scheduler.timesteps]
        self._check_deterministic()

    def start(self, noise: Tensor) -> Tensor:
        self.scheduler.set_timesteps(self.steps)  # schedulers with history start afresh
        sigma = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return noise * sigma

    def model_input(self, index: int, state: Tensor) -> Tensor:
        """The state on the model's scale: Euler, Heun and their like keep it on that of the noise."""
        scale = getattr(self.scheduler, "scale_model_input", None)  # flow matching has none
        if scale is None:
            return state
        scaled: Tensor = scale(state, self.scheduler.timesteps[index])
        return scaled

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        output = output[:, : state.shape[1]]  # a learned variance is the sampler's affair
        moved = self.scheduler.step(output, self.scheduler.timesteps[index], state)
        result: Tensor = moved.prev_sample
        return result

    def refined(self, substeps: int) -> Sampler:
        """A sampler with `substeps` steps for each one, that passes through the same timesteps.

        Raises:
            UsageError: the scheduler with that many steps does not, or it needs arguments that it was not given.
        """
        if hasattr(
            self.scheduler, "scale_noise"
        ):  # flow matching: between two noise levels all are alike
            return FlowSteps(
                divided(self.scheduler.sigmas, substeps),
                float(self.scheduler.config.num_train_timesteps),
            )
        fresh = type(self.scheduler).from_config(self.scheduler.config)
        fine = SchedulerSampler(fresh, self.steps * substeps)
        passed = fine.timesteps[::substeps]
        # schedulers round timesteps to whole numbers, where these are numbers of training steps
        gaps = [abs(a - b) for a, b in itertools.pairwise(self.timesteps)]
        slack = min(1.0, SLACK * min(gaps, default=math.inf))
        apart = any(abs(a - b) > slack for a, b in zip(passed, self.timesteps, strict=True))
        if apart or not self._ends_like(fine):
            raise UsageError(
                f"{type(self.scheduler).__name__} with {fine.steps} steps does not pass through its timesteps "
                f"with {self.steps}: {self.timesteps[:2]}, but {passed[:2]}. Make it with "
                "timestep_spacing='trailing', or set rollouts.substeps to 1.",
                code="DCR-U076",
            )
        return fine

    def _ends_like(self, fine: SchedulerSampler) -> bool:
        """Whether the last step leads to the same noise level, where schedulers say it."""
        levels = [getattr(s.scheduler, "sigmas", None) for s in (self, fine)]
        ends = [float(found[-1]) for found in levels if found is not None]
        if len(ends) < 2:
            return True
        own, other = ends
        return math.isclose(own, other, rel_tol=SAME_LEVEL, abs_tol=SAME_LEVEL)

    def _check_deterministic(self) -> None:
        """Rollouts must come out the same on every run, and what is exported has no noise of its own."""
        start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

        def end() -> Tensor:
            state = self.start(start)
            for index in range(len(self.timesteps)):
                state = self.step(self.model_input(index, state), index, state)
            return state

        if not torch.equal(end(), end()):
            raise UsageError(
                f"{type(self.scheduler).__name__} draws noise in its steps; rollouts need a sampler that does not, "
                "such as DDIM, Euler or DPM-Solver++. Make one with from_config(scheduler.config)",
                code="DCR-U062",
            )


class FlowSteps:
    """Euler steps for flow matching through given noise levels.

    Args:
        sigmas: (n + 1,) of n steps, and where the last one ends.
        scale: the model is called with ``timestep = scale * sigma``.
    """

    def __init__(self, sigmas: Tensor, scale: float) -> None:
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.timesteps = [scale * sigma for sigma in self.sigmas[:-1]]

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        output = output[:, : state.shape[1]]
        return state + (self.sigmas[index + 1] - self.sigmas[index]) * output


def divided(levels: Tensor, parts: int) -> Tensor:
    """(n + 1,) levels with each of the n spaces between them divided into equal parts: (n * parts + 1,)."""
    starts, ends = levels[:-1, None].double(), levels[1:, None].double()
    inner = starts + (ends - starts) * torch.arange(parts) / parts
    return torch.cat([inner.flatten(), levels[-1:].double()])


def timestep_like(example: Tensor, value: float, batch: int) -> Tensor:
    """`value` in the dtype and form of the model's timestep input."""
    if example.ndim == 0:
        return torch.tensor(value, dtype=example.dtype, device=example.device)
    return torch.full((batch, *example.shape[1:]), value).to(example.device, example.dtype)
