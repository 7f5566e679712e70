"""What the entries for the classes of diffusers share: small inputs, and models with no gate closed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]
BATCH = 2
TEXT = 7  # text tokens of the entries for images and sounds: odd, and no other size there


def asleep(model: nn.Module) -> list[nn.Parameter]:
    """Every all-zero parameter: a gate of zero would make a block the identity."""
    return [p for p in model.parameters() if p.is_floating_point() and not p.any()]


def awake(model: nn.Module, std: float = 0.1) -> nn.Module:
    """The model with small noise in every all-zero parameter."""
    with torch.no_grad():
        for parameter in asleep(model):
            parameter.normal_(std=std)
    return model


def some_text(width: int) -> Tensor:
    return torch.randn(BATCH, TEXT, width)


def text_mask() -> Tensor:
    """All text tokens of the first sample, all but two of the second."""
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, -2:] = False
    return mask


def some_times(largest: float = 1.0) -> Tensor:
    return largest * torch.tensor([0.8, 0.3])


def positions(*sizes: int, first: int = 0) -> Tensor:
    """(tokens, axes) of a grid, as floats; `first` is where the leading axis begins."""
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    axes[0] = axes[0] + first
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))
