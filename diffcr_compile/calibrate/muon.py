"""Muon (Jordan et al. 2024) over stacks of equal matrices.

The same arithmetic as ``torch.optim.Muon``, which takes the matrices one by one: for the reference DiT's 80 matrices that
is two thirds of all operations of a training step, and on a GPU such a step waits for launches. A transformer's
blocks are alike, so their matrices go through Newton-Schulz in one batched product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.calibrate.sharded_tensors import share_like, whole
from diffcr_compile.fast_bfloat16 import fast_bfloat16

MOMENTUM = 0.95
STEPS, EPS = 5, 1e-7
A, B, C = 3.4445, -4.7750, 2.0315
# Elements of a stack. Beyond it a single matrix fills a device, and a stack would only cost memory.
LARGEST_STACK = 2**24


class StackedMuon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, no weight decay; steps as large as AdamW's.

    Args:
        groups: parameter groups with ``params``, each of shape (rows, columns), and ``lr``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), {"lr": 1e-3})
        shapes = {tuple(p.shape) for g in self.param_groups for p in g["params"]}
        wrong = [shape for shape in shapes if len(shape) != 2]
        if wrong:
            raise ValueError(f"Muon is for matrices, got parameters of shape {wrong}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"])

    def _update(self, parameters: list[nn.Parameter], rate: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = [self._buffer(p) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, buffers, MOMENTUM)  # Nesterov
        for stack in stacks(parameters):
            # of sharded matrices every rank does the whole product
            directions = orthogonal(torch.stack([whole(ahead[i]) for i in stack]))
            chosen: list[Tensor] = [parameters[i] for i in stack]
            size = 0.2 * max(chosen[0].shape) ** 0.5  # of AdamW's steps (Liu et al. 2025)
            found = [share_like(d, chosen[0]) for d in directions.to(chosen[0].dtype)]
            torch._foreach_add_(chosen, found, alpha=-rate * size)

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def stacks(parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Positions of parameters of one shape, dtype and device, as many as a stack may hold."""
    alike: dict[Any, list[int]] = {}
    for position, p in enumerate(parameters):
        alike.setdefault((p.shape, p.dtype, p.device), []).append(position)
    for (shape, _, _), positions in alike.items():
        most = max(1, LARGEST_STACK // shape.numel())
        for start in range(0, len(positions), most):
            yield positions[start : start + most]


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, roughly: (S, rows, columns) -> the same.

    Five steps of a quintic Newton-Schulz iteration, coefficients of Jordan et al. 2024, in bfloat16; in float32 on a CPU
    where that is faster.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.to(torch.bfloat16 if fast_bfloat16(matrices.device) else torch.float32)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x if wide else x.mT
