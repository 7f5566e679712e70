"""Mixture-of-Depths (Raposo et al. 2024) with one keep ratio everywhere, as one writes it down in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MixtureOfDepths(nn.Module):
    """A block on its `kept` best tokens; what it adds is weighted by the score, the others pass by.

    Args:
        block: takes and returns (B, N, C).
        width: C.
        kept: K.
    """

    def __init__(self, block: nn.Module, width: int, kept: int) -> None:
        super().__init__()
        self.block, self.kept = block, kept
        self.router = nn.Linear(width, 1)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores = self.router(hidden).squeeze(-1)  # (B, N)
        best, index = torch.topk(scores, self.kept, dim=1)
        index, order = torch.sort(index, dim=1)  # in the order of the sequence
        weight = torch.gather(best, 1, order).sigmoid()  # (B, K)
        at = index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # (B, K, C)
        kept = torch.gather(hidden, 1, at)
        added = (self.block(kept, *args, **kwargs) - kept) * weight.unsqueeze(-1)
        return torch.scatter_add(hidden, 1, at, added)


def with_depths(
    model: nn.Module, width: int, kept: int, blocks: Callable[[nn.Module], nn.ModuleList]
) -> nn.Module:
    """`model`, changed in place."""
    layers = blocks(model)
    for number, block in enumerate(layers):
        layers[number] = MixtureOfDepths(block, width, kept)
    return model.eval()
