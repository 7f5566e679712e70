"""Copies of a block and of its arguments in float64, in which nothing is off that may be on after training."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, map_leaves
from diffcr_compile.float64 import float64_copy, float64_tree
from diffcr_compile.residual import noise

# Numbers below this are off: what they multiply would not show.
WEAK_PARAMETER = 0.02
WEAK_INPUT = 1e-3
MASKED = 0.3


def lively_tree(tree: Any, stream: Path, generator: torch.Generator) -> Any:
    """A call's arguments in float64, none of them off, and with noise on the tokens of the stream."""

    def switched_on(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if path == stream:  # equal tokens (a constant image) would hide every difference
            return leaf + 0.5 * noise(leaf, generator)
        # a gate (ReZero) if it is exactly zero, else more likely a constant such as an epsilon
        if leaf.ndim == 0:
            return leaf + 0.2 * noise(leaf, generator).abs() if leaf == 0 else leaf
        if _is_mask(leaf):  # zeros say something there
            return leaf
        # a gate that starts at zero may be computed outside the block (adaLN-single)
        weak = leaf.abs() < WEAK_INPUT
        return torch.where(weak, leaf + 0.2 * noise(leaf, generator), leaf)

    return map_leaves(float64_tree(tree), switched_on)


def partly_masked(tree: Any, counts: Set[int], generator: torch.Generator) -> Any | None:
    """The arguments with masks that mask something everywhere, and lengths below the whole; None if there are none.

    Examples are seldom padded, and never in the image. But where everything is seen, nobody can tell along which tokens a mask
    runs, and a block that counts its tokens looks like one that does not.

    Args:
        tree: the arguments.
        counts: numbers of tokens; a tensor with at most a number per sample that holds one of them may be lengths.
        generator: of what is masked.
    """
    found = False

    def masked(_: Path, leaf: Any) -> Any:
        nonlocal found
        if isinstance(leaf, Tensor) and (whole := _whole_lengths(leaf, counts)) is not None:
            found = True
            return torch.where(whole, leaf - leaf // 4, leaf)
        if not isinstance(leaf, Tensor) or not _is_mask(leaf):
            return leaf
        found = True
        off = torch.rand(leaf.shape, generator=generator).to(leaf.device) < MASKED
        fewer = torch.where(off, torch.zeros_like(leaf), leaf)
        along = max(range(leaf.ndim), key=lambda axis: leaf.shape[axis])
        is_empty = (fewer == 0).all(dim=along, keepdim=True)  # something is left everywhere
        return torch.where(is_empty, leaf, fewer)

    tree = map_leaves(tree, masked)
    return tree if found else None


def _whole_lengths(leaf: Tensor, counts: Set[int]) -> Tensor | None:
    """Which entries may say that a sample has all of its tokens; None where nothing does."""
    if leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool:
        return None
    if math.prod(leaf.shape[1:]) > 1:
        return None
    whole = sum(
        (leaf == count for count in counts), start=torch.zeros_like(leaf, dtype=torch.bool)
    )
    return whole if bool(whole.any()) else None


def _is_mask(leaf: Tensor) -> bool:
    """Zeros and ones, and not zeros alone, along more than a batch."""
    if leaf.ndim < 2 or max(leaf.shape) < 3 or leaf.is_complex():
        return False
    ones = leaf == 1
    return bool(ones.any()) and bool((ones | (leaf == 0)).all())


def lively_copy(module: nn.Module) -> nn.Module:
    """A float64 copy in which no parameter is off: a weak gate would hide what is behind it.

    Zeros and constants get noise, weak rows of matrices are scaled up to the size of fresh ones.
    """
    block = float64_copy(module)
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        if not parameter.is_floating_point():
            continue
        data = parameter.data
        if data.ndim >= 2:
            usual = data[0].numel() ** -0.5
            size = data.square().mean(dim=-1, keepdim=True).sqrt()
            data = torch.where(size < 0.1 * usual, data * usual / size.clamp_min(1e-300), data)
        is_constant = data.numel() > 1 and bool((data == data.flatten()[0]).all())
        hides = (data == 0) if data.ndim >= 2 else (data.abs() < WEAK_PARAMETER)
        parameter.data = data + (hides | is_constant) * 0.2 * noise(data, generator)
    return block
