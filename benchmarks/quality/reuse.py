"""A step-reuse cache: cached steps add again what the middle blocks added in the last full step.

After DeepCache (Ma et al. 2024) and Delta-DiT (Chen et al. 2024), training-free. In a cached step the
first blocks and the last one run. How often a full step comes is a choice of these methods; of all that the
budget allows, the one that stays nearest to the dense model on a few samples is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.quality.case import Case
from diffcr_compile.budgets import cost_table
from diffcr_compile.config import RoutingConfig
from diffcr_compile.reference import demo

TRIAL_SAMPLES = 50


class StepReuse:
    """The reference DiT with such a cache.

    Args:
        model: the dense model; the calls of its blocks are replaced.
        budget: share of the dense MACs that a loop may cost.
        block_share: what one block costs of a call.
        noise: what a choice is tried on, with its condition (B, 1 + c, 32, 32).
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float,
        block_share: float,
        noise: Tensor | None = None,
    ) -> None:
        self.model, self.budget, self.block_share = model, budget, block_share
        self.noise = noise
        self.blocks = list(model.transformer_blocks)
        self.step = self.interval = 1
        self.cached = 0  # blocks that a cached step leaves out, up to the one before the last
        self.entered: Tensor | None = None
        self.added: Tensor | None = None
        for number, block in enumerate(self.blocks):
            block.forward = self._with_cache(block.forward, number)

    def __call__(self, x: Tensor, timestep: float, labels: Tensor) -> Tensor:
        times = torch.full((len(x),), timestep, device=x.device)
        velocity: Tensor = self.model(x, timestep=times, class_labels=labels).sample
        self.step += 1
        return velocity

    def start(self, steps: int) -> None:
        """A new loop: the first step is a full one."""
        self.step = 0
        self.interval, self.cached = self.choice(steps)

    @functools.cache  # noqa: B019 - lives as long as the benchmark
    def choice(self, steps: int) -> tuple[int, int]:
        """Interval of full steps and blocks left out in the others, for a loop of `steps` steps."""
        options = [
            (interval, cached)
            for interval in range(2, steps + 1)
            if (cached := self._needed(interval, steps)) < len(self.blocks)
        ]
        return min(options, key=lambda option: self._error(option, steps))

    def share(self, steps: int) -> float:
        interval, cached = self.choice(steps)
        left_out = steps - len(range(0, steps, interval))
        return 1 - left_out * cached * self.block_share / steps

    def _needed(self, interval: int, steps: int) -> int:
        cached_steps = steps - len(range(0, steps, interval))
        saved = (1 - self.budget) * steps / cached_steps
        return -int(-saved // self.block_share)

    @torch.inference_mode()
    def _error(self, option: tuple[int, int], steps: int) -> float:
        ends = []
        for self.interval, self.cached in (option, (1, 0)):
            assert self.noise is not None
            x, condition = self.noise[:, :1], self.noise[:, 1:]
            labels = torch.arange(len(x), device=x.device) % demo.NUM_CLASSES
            self.step = 0
            for step in range(steps):
                given = torch.cat([x, condition], 1)
                x = x - self(given, 1000 * (1 - step / steps), labels) / steps
            ends.append(x)
        self.step = 0
        return mse_loss(*ends).item()

    def _with_cache(self, dense: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            last = len(self.blocks) - 1
            first = last - self.cached
            if not first <= number < last:
                return dense(hidden, *args, **kwargs)
            if number == first:
                self.entered = hidden
            if self.step % self.interval:
                assert self.added is not None
                return hidden + self.added if number == first else hidden
            out = dense(hidden, *args, **kwargs)
            if number == last - 1:
                assert self.entered is not None
                self.added = out - self.entered
            return out

        return forward


def build(case: Case) -> Any:
    from benchmarks.quality.variants import Built

    program = case.routed().program
    costs = cost_table(program, RoutingConfig())
    block_share = costs.per_level[program.blocks[0].name][-1] / costs.dense
    generator = torch.Generator().manual_seed(99)  # no seed of the table
    noise = torch.randn((TRIAL_SAMPLES, 1, 32, 32), generator=generator)
    tried = torch.cat([noise, case.asked_for(TRIAL_SAMPLES)[1]], 1).to(case.scale.device)
    reuse = StepReuse(case.model(), case.job.budget, block_share, tried)
    return Built(reuse, reuse.share, start=reuse.start)
