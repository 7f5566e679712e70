"""Learn keep ratios under an exact budget.

The ratios are a plain array that is *projected* after every step: all of them are shifted, each by as
much as a token of its block costs, so that the schedule costs exactly the current budget, and each
stays in its range. No ratio can leave its range and get stuck there (a clamp inside the loss has
gradient zero outside), and there is no budget weight to tune: ratios come to rest where the last
bit of cost is worth equally much in every block.

Gradient of a ratio (``boundary``): the tokens ranked between the two bins around the ratio are
processed too, and their residual is weighted by how far the ratio has come from the lower to the
upper bin. The derivative by that weight says what one more bin of tokens is worth in that block.
"""

from __future__ import annotations

import bisect
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffcr_compile.program import Program
from diffcr_compile.routing import TokenSelector
from diffcr_compile.schedule import (
    CostTable,
    Floats,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
)

MOMENTUM = 0.9
RatiosPer = Literal["block_and_bucket", "block", "bucket", "model"]
_BISECTIONS = 60
# Of a mean block's slope. A measured block may take as long with few tokens as with all.
_LEAST_SLOPE = 0.1


class RatioLearner:
    """Keep ratios of all blocks and timestep buckets, and the way into the program's selectors.

    Attributes:
        values: (blocks, buckets) keep ratios, each in [smallest level / N, 1].
        momentum: (blocks, buckets) running mean of the gradients.
        slopes: (blocks, 1) what a block's ratio costs from its lowest level to 1, relative to the mean block;
            all 1 where blocks share a ratio.
    """

    def __init__(
        self,
        program: Program,
        costs: CostTable,
        buckets: TimestepBuckets,
        *,
        two_bin: bool,
        per: RatiosPer = "block_and_bucket",
    ) -> None:
        self.names = tuple(spec.name for spec in program.blocks)
        self.costs, self.buckets, self.two_bin, self.per = costs, buckets, two_bin, per
        self.values: Floats = np.ones((len(self.names), len(buckets)))
        self.momentum: Floats = np.zeros_like(self.values)
        self.lowest = np.array([costs.levels[n][0] / costs.levels[n][-1] for n in self.names])
        self.slopes: Floats = self._slopes()
        self._selectors = list(program.module.selectors.values())
        self._blends: list[Tensor | None] = [None] * len(self.names)

    def cost(self, values: Floats | None = None) -> float:
        """Share of the dense MACs, averaged over the sampling steps, linear between levels."""
        values = self.values if values is None else values
        total = self.costs.outer
        for row, name in enumerate(self.names):
            levels = np.array(self.costs.levels[name]) / self.costs.levels[name][-1]
            macs = np.interp(values[row], levels, np.array(self.costs.per_level[name]))
            total += float(macs @ np.array(self.buckets.weights))
        return total / self.costs.dense

    def project(self, budget: float) -> None:
        """Shift all ratios in proportion to `slopes`, within their ranges, so that they cost `budget`."""
        high = 1 / float(
            self.slopes.min()
        )  # how far to shift down; here all are at their lowest
        low = -high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self.cost(self._shifted(middle)) > budget:
                low = middle
            else:
                high = middle
        self.values = self._shifted(high)

    def approach(self, target: Floats, budget: float) -> None:
        """Put all ratios on the way from 1 to `target`, as far along as `budget` asks."""
        near, far = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (near + far) / 2
            if self.cost(1 - middle * (1 - target)) > budget:
                near = middle
            else:
                far = middle
        self.values = 1 - far * (1 - target)

    def _shifted(self, amount: float) -> Floats:
        return np.clip(self.values - amount * self.slopes, self.lowest[:, None], 1.0)

    def _slopes(self) -> Floats:
        slopes = np.ones((len(self.names), 1))
        if self.per in ("bucket", "model"):
            return slopes
        # Over the whole range: from level to level a measured cost is a staircase.
        free = np.flatnonzero(self.lowest < 1)
        costs = [self.costs.per_level[self.names[row]] for row in free]
        found = np.array([cost[-1] - cost[0] for cost in costs]) / (1 - self.lowest[free])
        if len(free) and found.mean() > 0:
            slopes[free, 0] = np.maximum(found / found.mean(), _LEAST_SLOPE)
        return slopes

    def attach(self, bucket: int) -> None:
        """Let every selector keep the tokens of one bucket's column, ready for a gradient."""
        for row, (name, selector) in enumerate(zip(self.names, self._selectors, strict=True)):
            levels = self.costs.levels[name]
            if len(levels) == 1:
                selector.keep(levels[-1])
                continue
            tokens = self.values[row, bucket] * levels[-1]
            upper = min(max(bisect.bisect_left(levels, tokens), 1), len(levels) - 1)
            low, high = levels[upper - 1], levels[upper]
            weight = float(np.clip((tokens - low) / (high - low), 0, 1))
            device = next(selector.parameters(), torch.empty(0)).device
            blend = torch.tensor(weight, device=device, requires_grad=True)
            # Nothing to run at the lower bin of 0: its output is the stream, as in `boundary`.
            selector.keep_between(low, high, blend, two_bin=self.two_bin and low > 0)
            self._blends[row] = blend

    @property
    def blends(self) -> list[Tensor]:
        """The weights that carry the ratios' gradients, of the bucket that is attached."""
        return [blend for blend in self._blends if blend is not None]

    def step(self, bucket: int, lr: float) -> None:
        """Move one bucket's column along its averaged gradients; the caller projects afterwards."""
        for row, (name, blend) in enumerate(zip(self.names, self._blends, strict=True)):
            if blend is None or blend.grad is None:
                continue
            selector = self._selectors[row]
            assert selector.low_tokens is not None
            per_ratio = self.costs.levels[name][-1] / (
                selector.kept_tokens - selector.low_tokens
            )
            gradient = float(blend.grad) * per_ratio
            self.momentum[row, bucket] += (1 - MOMENTUM) * (
                gradient - self.momentum[row, bucket]
            )
        gradients = self._tied(self.momentum)
        # One scale for all cells keeps their gradients comparable; the mean is the budget's affair.
        scale = float(np.sqrt(np.mean(gradients**2))) + 1e-12
        moved = slice(None) if self.per == "block" else bucket
        self.values[:, moved] -= lr * gradients[:, moved] / scale
        self.values = np.clip(self.values, self.lowest[:, None], 1.0)

    def _tied(self, cells: Floats) -> Floats:
        """The mean over all cells that share a ratio, in each of them."""
        if self.per == "block":
            weights = np.array(self.buckets.weights)
            return np.broadcast_to((cells @ weights)[:, None], cells.shape)
        if self.per == "bucket":
            return np.broadcast_to(cells.mean(0, keepdims=True), cells.shape)
        return cells if self.per == "block_and_bucket" else np.full_like(cells, cells.mean())

    def keep(self, schedule: TokenSchedule, bucket: int) -> None:
        """Let every selector keep exactly what the schedule says."""
        keep_column(
            self._selectors, [schedule.kept_tokens[name][bucket] for name in self.names]
        )

    def keep_all(self) -> None:
        """Back to the dense model."""
        keep_column(self._selectors, [self.costs.levels[name][-1] for name in self.names])

    def ratios(self) -> KeepRatios:
        """The current ratios."""
        return KeepRatios(self.names, self.values.copy())


def keep_column(selectors: list[TokenSelector], kept: list[int]) -> None:
    """Set K of each selector."""
    for selector, tokens in zip(selectors, kept, strict=True):
        selector.keep(tokens)
