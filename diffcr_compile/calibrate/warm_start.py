"""Start routers and shortcuts informed, in closed form and from a few batches.

A token for which a block does little beyond its shortcut loses little by bypassing it. So shortcuts are fitted first, and
least squares then gives the linear router that best predicts the size of what they leave: the block's residual, where
there are none. It is also all there is to a training-free mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import BlockSpec, get_leaf
from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.calibrate.fit_shortcuts import RIDGE, ShortcutFit
from diffcr_compile.errors import AccuracyError
from diffcr_compile.program import Program, run_flat
from diffcr_compile.routing import TokenRouter, image_tokens
from diffcr_compile.shortcut import LinearShortcut

Observe = Callable[[Tensor, Tensor], None]


@torch.no_grad()
def warm_start(
    program: Program, states: TeacherStates, chosen: Tensor, batch: int
) -> dict[str, float]:
    """Fit every shortcut, then every linear router; all tokens must be kept at the time.

    Args:
        program: ROUTED.
        states: where inputs are taken from.
        chosen: indices of the states to use.
        batch: states per forward.

    Raises:
        AccuracyError: a block that gets a shortcut is given or puts out NaN or infinite values.

    Returns:
        Per block: the share in [0, 1] of the variance of the log size of what is left of the residual that the router
        explains, per sample.
    """
    if program.module.shortcuts:
        _start_shortcuts(program, states, chosen, batch)
    return _start_routers(program, states, chosen, batch)


def _start_shortcuts(
    program: Program, states: TeacherStates, chosen: Tensor, batch: int
) -> None:
    fits = {spec.name: ShortcutFit(spec.width) for spec in program.blocks}
    observers = {name: fit.add for name, fit in fits.items()}
    _observe(program, states, chosen, batch, observers)
    for name, shortcut in program.module.shortcuts.items():
        if not fits[name].is_finite:
            raise AccuracyError(
                f"{name}: what it is given or puts out is NaN or infinite on some calibration states, so no shortcut can "
                "be fitted. Look for very large values in the model's weights, inputs and data, run the model in "
                "float32, or set routing.shortcut_rank: 0",
                code="DCR-Q010",
            )
        fits[name].put_into(shortcut)


def _start_routers(
    program: Program, states: TeacherStates, chosen: Tensor, batch: int
) -> dict[str, float]:
    shortcuts = program.module.shortcuts
    sizes = {
        spec.name: _SizeFit(spec.width, shortcuts.get(spec.name)) for spec in program.blocks
    }
    _observe(program, states, chosen, batch, {name: fit.add for name, fit in sizes.items()})
    explained = {}
    for name, router in program.module.routers.items():
        if isinstance(router, TokenRouter):
            weight, explained[name] = sizes[name].solve()
            router.score.weight.copy_(weight[None])
    return explained


def _observe(
    program: Program,
    states: TeacherStates,
    chosen: Tensor,
    batch: int,
    observers: Mapping[str, Observe],
) -> None:
    """Run the states, and give each block's observer its image tokens and what the block adds to them, (B, N, C)."""

    def hook(spec: BlockSpec) -> Callable[..., None]:
        def seen(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before: Tensor = get_leaf((args, kwargs), spec.stream.path)
            after: Tensor = get_leaf(output, spec.output)
            tokens = image_tokens(before, spec.stream.start, spec.num_tokens)
            change = image_tokens(after, spec.stream.start, spec.num_tokens)
            if spec.bypass == "stream":
                change = change.double() - tokens.double()
            observers[spec.name](tokens, change)

        return seen

    handles = [
        program.module.get_submodule(spec.name).register_forward_hook(
            hook(spec), with_kwargs=True
        )
        for spec in program.blocks
    ]
    batched = batched_inputs(program)
    try:
        for part in torch.split(chosen, batch):
            inputs, _ = states.take(part, batched)
            run_flat(program, inputs)
    finally:
        for handle in handles:
            handle.remove()


class _SizeFit:
    """Accumulates the normal equations of log|change| on tokens, centred per sample."""

    def __init__(self, width: int, shortcut: LinearShortcut | None) -> None:
        self.width = width
        # In float64, as all that is summed here: the result then hardly depends on how memory is aligned.
        self.shortcut = copy.deepcopy(shortcut).double() if shortcut else None
        self.square = torch.zeros(width, width, dtype=torch.float64)
        self.product = torch.zeros(width, dtype=torch.float64)
        self.variance = 0.0

    def add(self, tokens: Tensor, change: Tensor) -> None:
        tokens, left = tokens.double(), change.double()
        if self.shortcut is not None:
            left = left - self.shortcut.change(tokens)
        size = left.norm(dim=2).clamp_min(1e-12).log()  # (B, N)
        size = size - size.mean(1, keepdim=True)  # top-k compares tokens of one sample only
        tokens = tokens - tokens.mean(1, keepdim=True)
        self.square += torch.einsum("bnc,bnd->cd", tokens, tokens).cpu()
        self.product += torch.einsum("bnc,bn->c", tokens, size).cpu()
        self.variance += float(size.square().sum())

    def solve(self) -> tuple[Tensor, float]:
        ridge = RIDGE * self.square.diagonal().mean().clamp_min(1e-12)
        eye = torch.eye(self.width, dtype=torch.float64)
        weight = torch.linalg.solve(self.square + ridge * eye, self.product)
        explained = float(weight @ self.product) / max(self.variance, 1e-30)
        return weight.float(), min(max(explained, 0.0), 1.0)
