"""What a step of the sampler would have to be given to get where the dense model gets in several smaller ones.

With few sampling steps most of the error is that of the steps, and no network that imitates the dense one at
single states can be better. Trained towards these outputs, the routed model takes one step for `substeps` of the
dense model's: the steps are distilled together with the routing (progressive distillation, Salimans and Ho, ICLR
2022, whose targets these are, in one go).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffcr_compile.calibrate.samplers import Sampler
from diffcr_compile.errors import UsageError

# Of the largest value of a state; a step is a handful of float32 operations.
ROUNDING = 1e-4


def refined(sampler: Sampler, substeps: int) -> Sampler:
    """The sampler with `substeps` steps for each one.

    Raises:
        UsageError: it cannot be refined.
    """
    if substeps == 1:
        return sampler
    refine = getattr(sampler, "refined", None)
    if refine is None:
        raise _wrong(
            f"{type(sampler).__name__} has no refined(substeps), which rollouts.substeps = {substeps} needs: "
            "the same sampler with that many steps for each one. Add it, or set rollouts.substeps to 1"
        )
    fine: Sampler = refine(substeps)
    return fine


def output_leading_to(sampler: Sampler, index: int, state: Tensor, later: Tensor) -> Tensor:
    """The output with which the sampler's step at `index` leads from `state` to `later`, both (B, C, ...).

    The step must be a sum of the state and of the output, each times a number, as all steps of deterministic samplers
    without a memory of earlier steps are (Euler, DDIM).

    Raises:
        UsageError: it is not.
    """

    def step(output: Tensor) -> Tensor:
        sampler.start(state)  # diffusers' schedulers count their steps
        return sampler.step(output, index, state)

    from_nothing = step(torch.zeros_like(state))
    slope = step(torch.ones_like(state)) - from_nothing
    output = (later - from_nothing) / slope
    missed = (step(output) - later).abs().max() / later.abs().max()
    if not missed <= ROUNDING:  # also if it is no number
        raise _wrong(
            f"a step of {type(sampler).__name__} is not linear in the model's output, so that no output stands for "
            f"several steps (missed by {float(missed):.1e}). Use an Euler or DDIM sampler that clips nothing, or set "
            "rollouts.substeps to 1"
        )
    return output


def check_memoryless(sampler: Sampler, like: Tensor) -> None:
    """Raise UsageError if a step depends on the steps before it, as those of DPM-Solver++ (2M) or Adams-Bashforth do.

    Args:
        sampler: any.
        like: a tensor (B, C, ...) in the form of a state.
    """
    generator = torch.Generator().manual_seed(0)
    usual, other, state = (
        torch.randn(like.shape, generator=generator).to(like) for _ in range(3)
    )

    def ends(different: int) -> list[Tensor]:
        """Where each step leads from `state`, with another output in every second one from `different` on."""
        sampler.start(state)
        outputs = [
            other if index % 2 == different else usual
            for index in range(len(sampler.timesteps))
        ]
        return [sampler.step(output, index, state) for index, output in enumerate(outputs)]

    always, evens, odds = ends(2), ends(0), ends(1)
    # a step with the usual output, after steps with another one
    alike = zip(always[1::2] + always[::2], evens[1::2] + odds[::2], strict=True)
    if not all(torch.equal(one, two) for one, two in alike):
        raise _wrong(
            f"{type(sampler).__name__} remembers earlier steps, so that a step alone cannot stand for several. Use an "
            "Euler or DDIM sampler, or set rollouts.substeps to 1"
        )


def _wrong(what: str) -> UsageError:
    return UsageError(what + ".", code="DCR-U076")
