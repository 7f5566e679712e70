"""What the routers look at: how many blocks process each token, over the steps of a sampling loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from diffcr_compile import routing
from diffcr_compile.program import Program, flat_tensors

Floats = npt.NDArray[np.float32]
SHOWN_STEPS = 6
SHOWN_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Importance:
    """Samples on their way, and the share of the blocks that process each of their tokens.

    Attributes:
        timesteps: of the steps that are shown, in sampling order.
        samples: (steps, samples, channels, height, width), as they go into the step.
        shares: (steps, samples, rows, columns) in [0, 1], on the grid of tokens.
    """

    timesteps: tuple[float, ...]
    samples: Floats
    shares: Floats


@torch.no_grad()
def token_importance(
    frozen: Sequence[Program], timesteps: Sequence[float], seed: int = 0
) -> Importance | None:
    """Run FROZEN graphs over a sampling loop and watch which tokens are kept.

    Args:
        frozen: one program per timestep bucket.
        timesteps: values of the timestep input, in sampling order.
        seed: of the noise.

    Returns:
        None where the sample is no picture, or its tokens are no grid of patches of it.
    """
    first = frozen[0]
    schedule, sample_name, time_name = first.schedule, first.sample_input, first.timestep_input
    if schedule is None or sample_name is None or time_name is None:
        return None
    example = first.example[sample_name]
    tokens = max(spec.num_tokens for spec in first.blocks)
    grid = token_grid(tuple(example.shape), tokens)
    if grid is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(example.shape, generator=generator).to(example)
    shown = set(np.linspace(0, len(timesteps) - 1, SHOWN_STEPS).round().astype(int).tolist())
    kept_steps, samples, shares = [], [], []
    for step, value in enumerate(timesteps):
        time = _filled(first.example[time_name], value)
        program = frozen[schedule.buckets.index_of(float(time.flatten()[0]))]  # as at run time
        call = {**program.example, sample_name: sample, time_name: time}
        watch = _Watch(program, tokens)
        outputs = flat_tensors(watch.run(*call.values()))
        if step in shown:
            kept_steps.append(float(value))
            samples.append(sample[:SHOWN_SAMPLES].float().cpu().numpy())
            shares.append(watch.share()[:SHOWN_SAMPLES].reshape(-1, *grid).cpu().numpy())
        if outputs[0].shape == sample.shape:
            sample = sample - outputs[0] / len(timesteps)
    return Importance(tuple(kept_steps), np.stack(samples), np.stack(shares))


def _filled(timestep: Tensor, value: float) -> Tensor:
    return torch.full_like(timestep, value if timestep.is_floating_point() else round(value))


def token_grid(sample: Sequence[int], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the tokens: square patches of a (batch, channels, height, width) sample."""
    if len(sample) != 4:
        return None
    height, width = sample[2:]
    for patch in range(1, min(height, width) + 1):
        if (
            height % patch == 0
            and width % patch == 0
            and height // patch * (width // patch) == tokens
        ):
            return height // patch, width // patch
    return None


class _Watch(fx.Interpreter):
    """Runs a FROZEN graph and counts, per sample and token, the blocks that process it."""

    def __init__(self, program: Program, tokens: int) -> None:
        super().__init__(program.module)
        self.program, self.tokens = program, tokens
        self.counts = torch.zeros(program.batch, tokens)
        assert program.schedule is not None
        assert program.bucket is not None
        column = program.schedule.column(program.bucket)
        self.blocks = [spec for spec in program.blocks if spec.num_tokens == tokens]
        # a block that keeps all tokens has no selection in the graph
        self.counts += sum(column[spec.name] == tokens for spec in self.blocks)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is routing.select_tokens:
            logits = self.fetch_args_kwargs_from_env(n)[0][0]  # (B, N)
            if logits.shape[1] == self.tokens:
                self.counts.scatter_add_(1, result.cpu(), torch.ones(result.shape))
        return result

    def share(self) -> Tensor:
        """(batch, tokens) in [0, 1]."""
        return self.counts / max(len(self.blocks), 1)
