"""Start the routers informed: regress the size of a block's residual on its input tokens.

A token whose residual is small loses little by bypassing the block. Least squares gives, in closed
form and from a few batches, the linear router that predicts that size best. It is also all there
is to a training-free mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import BlockSpec, get_leaf
from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.program import Program, run_flat
from diffcr_compile.routing import TokenRouter, image_tokens

RIDGE = 1e-3  # of the mean eigenvalue of the token covariance


@torch.no_grad()
def warm_start_routers(
    program: Program, states: TeacherStates, chosen: Tensor, batch: int
) -> dict[str, float]:
    """Set every linear router by ridge regression; all tokens must be kept at the time.

    Args:
        program: ROUTED.
        states: where inputs are taken from.
        chosen: indices of the states to use.
        batch: states per forward.

    Returns:
        Per block: the share in [0, 1] of the variance of the residual's log size that the router
        explains, per sample.
    """
    fits = {spec.name: _Regression(spec) for spec in program.blocks}
    handles = [
        program.module.get_submodule(name).register_forward_hook(fit.observe, with_kwargs=True)
        for name, fit in fits.items()
    ]
    batched = batched_inputs(program)
    try:
        for part in torch.split(chosen, batch):
            inputs, _ = states.take(part, batched)
            run_flat(program, inputs)
    finally:
        for handle in handles:
            handle.remove()
    explained = {}
    for name, router in program.module.routers.items():
        if isinstance(router, TokenRouter):
            weight, explained[name] = fits[name].solve()
            router.score.weight.copy_(weight[None])
    return explained


class _Regression:
    """Accumulates the normal equations of log|residual| on tokens, centred per sample."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.square = torch.zeros(spec.width, spec.width, dtype=torch.float64)
        self.product = torch.zeros(spec.width, dtype=torch.float64)
        self.variance = 0.0

    def observe(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        spec = self.spec
        before: Tensor = get_leaf((args, kwargs), spec.stream.path)
        after: Tensor = get_leaf(output, spec.output)
        tokens = image_tokens(before, spec.stream.start, spec.num_tokens).double()  # (B, N, C)
        moved = image_tokens(after, spec.stream.start, spec.num_tokens).double()
        if spec.bypass == "stream":
            moved = moved - tokens
        size = moved.norm(dim=2).clamp_min(1e-12).log()  # (B, N)
        size = size - size.mean(1, keepdim=True)  # top-k compares tokens of one sample only
        tokens = tokens - tokens.mean(1, keepdim=True)
        self.square += torch.einsum("bnc,bnd->cd", tokens, tokens).cpu()
        self.product += torch.einsum("bnc,bn->c", tokens, size).cpu()
        self.variance += float(size.square().sum())

    def solve(self) -> tuple[Tensor, float]:
        ridge = RIDGE * self.square.diagonal().mean().clamp_min(1e-12)
        eye = torch.eye(self.spec.width, dtype=torch.float64)
        weight = torch.linalg.solve(self.square + ridge * eye, self.product)
        explained = float(weight @ self.product) / max(self.variance, 1e-30)
        return weight.float(), min(max(explained, 0.0), 1.0)
