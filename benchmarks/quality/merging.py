"""2-D token merging (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion"), training-free.

In every block the tokens are split over the grid: one random token of each window is a destination, the others
are sources. The r sources most similar to a destination (cosine) are averaged into it; the block runs on
what is left, and what it adds to a merged token is added to all tokens in it. Windows are 2 x 2 and
really two-dimensional; a budget below what they allow takes 4 x 4. Whole blocks run on merged tokens here,
attention and feed-forward alike, as the budget asks for more than attention alone would save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.case import Case
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program

GRID = 16  # tokens a side


def build(case: Case) -> Any:
    from benchmarks.quality.variants import Built, plain

    left, share = kept_for(case.routed().program, case.job.budget)
    model = merging_dit(case.model(), left, case.job.seed)
    return Built(plain(model), lambda _: share, facts={"tokens_left": left})


def merging_dit(model: nn.Module, left: int, seed: int) -> nn.Module:
    """The model, each of whose blocks runs on `left` tokens from now on."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer_blocks:
        block.forward = merged(block.forward, left, generator)
    return model


def kept_for(program: Program, budget: float) -> tuple[int, float]:
    """The most tokens that every block may keep, and what that costs; similarities are not counted."""
    costs = measure_costs(program, 1, 1 / GRID**2)

    def share(tokens: int) -> float:
        blocks = sum(
            costs.at(spec.name, tokens) - _router(spec, tokens) for spec in program.blocks
        )
        return (costs.outer + blocks) / costs.dense

    def _router(spec: Any, tokens: int) -> float:
        return costs.routing[spec.name][costs.levels[spec.name].index(tokens)]

    left = max(t for t in range(1, GRID**2 + 1) if share(t) <= budget)
    return left, share(left)


def merged(
    block: Callable[..., Tensor], left: int, generator: torch.Generator
) -> Callable[..., Tensor]:
    """The block on `left` merged tokens of (B, N, C), N a square."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        source, target = matches(hidden, left, generator)
        few = merge(hidden, source, target)  # (B, left, C)
        added = block(few, *args, **kwargs) - few
        return hidden + unmerge(added, source, target, hidden.shape[1])

    return forward


def matches(hidden: Tensor, left: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens go, and into which they go: (B, N - left) each, positions in the stream."""
    tokens = hidden.shape[1]
    destinations = window_picks(tokens, left, generator).to(hidden.device)  # (D,)
    is_source = torch.ones(tokens, dtype=torch.bool, device=hidden.device)
    is_source[destinations] = False
    sources = is_source.nonzero().flatten()  # (S,)
    unit = nn.functional.normalize(hidden, dim=-1)
    similar = unit[:, sources] @ unit[:, destinations].transpose(1, 2)  # (B, S, D)
    best, where = similar.max(-1)  # (B, S)
    gone = best.topk(tokens - left, dim=1).indices  # (B, N - left)
    return sources[gone], destinations[where.gather(1, gone)]


def window_picks(tokens: int, left: int, generator: torch.Generator) -> Tensor:
    """One random token of each window, the smallest windows that leave few enough destinations."""
    side = next(s for s in (2, 4, 8) if tokens // s**2 <= left)
    grid = math.isqrt(tokens)
    across = grid // side
    inside = torch.randint(side * side, (across, across), generator=generator)
    rows = torch.arange(across)[:, None] * side + inside // side
    columns = torch.arange(across)[None, :] * side + inside % side
    return (rows * grid + columns).flatten()


def merge(hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Sources averaged into their targets, then left away: (B, N, C) -> (B, N - S, C)."""
    batch, tokens, width = hidden.shape
    at = target[..., None].expand(-1, -1, width)
    moved = hidden.gather(1, source[..., None].expand(-1, -1, width))
    mean = hidden.scatter_reduce(1, at, moved, "mean", include_self=True)
    return mean[_stays(source, tokens)].reshape(batch, -1, width)


def unmerge(few: Tensor, source: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Back to all tokens; a merged one gets what its target got: (B, N - S, C) -> (B, N, C)."""
    batch, _, width = few.shape
    out = few.new_zeros(batch, tokens, width)
    out[_stays(source, tokens)] = few.reshape(-1, width)
    got = out.gather(1, target[..., None].expand(-1, -1, width))
    return out.scatter(1, source[..., None].expand(-1, -1, width), got)


def _stays(source: Tensor, tokens: int) -> Tensor:
    stays = torch.ones(len(source), tokens, dtype=torch.bool, device=source.device)
    return stays.scatter(1, source, torch.zeros_like(source, dtype=torch.bool))
