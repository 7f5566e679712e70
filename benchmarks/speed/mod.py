"""Mixture-of-Depths (Raposo et al. 2024) with one keep ratio everywhere, as one writes it down in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def add_depths(block: nn.Module, width: int, kept: int) -> None:
    """Let a block of (B, N, C) work on its `kept` best tokens, in place.

    What it adds is weighted by the score; the other tokens pass by.
    """
    block.router = nn.Linear(width, 1)
    block.forward = _on_the_best(block.router, block.forward, kept)  # type: ignore[method-assign]


def _on_the_best(
    router: Callable[[Tensor], Tensor], block: Callable[..., Tensor], kept: int
) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores = router(hidden).squeeze(-1)  # (B, N)
        best, index = torch.topk(scores, kept, dim=1)
        index, order = torch.sort(index, dim=1)  # in the order of the sequence
        weight = torch.gather(best, 1, order).sigmoid()  # (B, K)
        at = index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # (B, K, C)
        few = torch.gather(hidden, 1, at)
        added = (block(few, *args, **kwargs) - few) * weight.unsqueeze(-1)
        return torch.scatter_add(hidden, 1, at, added)

    return forward
