"""Exact top-k for executors whose TopK takes a K of at most `limit`, such as TensorRT's 3840.

Two spellings, both with the set of a plain top-k, ties included (the token that stands first wins):

* pieces: the best `limit`, then the best of the rest, and so on; ceil(K / limit) TopK over N;
* complement: the N - K worst in pieces, and then every other token in ascending order.

The one with fewer pieces is used. Neither needs NonZero, CumSum (a loop in TensorRT before 10.8) or a
scatter with a reduction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions are counted in groups of this many tokens. Counts up to 128 are exact in every floating type
# down to bfloat16, so the one matrix product here survives any choice of precision.
GROUP = 128


def large_topk(logits: Tensor, kept_tokens: int, limit: int) -> Tensor:
    """Positions of the `kept_tokens` highest logits with no TopK of more than `limit`: (B, N) -> (B, K).

    Args:
        logits: finite, (B, N).
        kept_tokens: 0 < K <= N.
        limit: largest K of one TopK, at least 1.
    """
    num_tokens = logits.shape[1]
    if kept_tokens == num_tokens:
        return torch.arange(num_tokens, device=logits.device).expand(logits.shape)
    if pieces(num_tokens - kept_tokens, limit) < pieces(kept_tokens, limit):
        # Reversed, because among equal logits the last tokens are the ones to bypass.
        worst = best_in_pieces(-logits.flip(1), num_tokens - kept_tokens, limit)
        return all_but(num_tokens - 1 - worst, num_tokens)  # (B, K)
    return best_in_pieces(logits, kept_tokens, limit)


def pieces(count: int, limit: int) -> int:
    """How many TopK it takes to choose `count` tokens."""
    return -(-count // limit)


def best_in_pieces(logits: Tensor, count: int, limit: int) -> Tensor:
    """Positions of the `count` highest logits, best first: (B, N) -> (B, count)."""
    found: list[Tensor] = []
    rows = _rows(logits)
    for start in range(0, count, limit):
        if found:  # what is chosen is out of the running
            lowest = torch.full_like(
                found[-1], torch.finfo(logits.dtype).min, dtype=logits.dtype
            )
            logits = logits.index_put((rows, found[-1]), lowest)
        found.append(logits.topk(min(limit, count - start), dim=1).indices)
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def all_but(positions: Tensor, num_tokens: int) -> Tensor:
    """Every position that is not among `positions`, ascending: (B, M) -> (B, N - M).

    Each token is told its place, kept ones first, which is a permutation, and then writes its own
    position there.
    """
    batch, rows = positions.shape[0], _rows(positions)
    ones = torch.ones(batch, num_tokens, device=positions.device)
    mask = ones.index_put((rows, positions), torch.zeros_like(positions, dtype=ones.dtype))
    kept_until = count_until(mask)  # (B, N) integers, this token included
    here = torch.arange(num_tokens, device=positions.device).expand(batch, -1)  # (B, N)
    kept = num_tokens - positions.shape[1]
    place = torch.where(mask > 0, kept_until - 1, kept + here - kept_until)
    order = torch.zeros_like(here).index_put((rows, place), here)  # (B, N)
    return order[:, :kept]


def count_until(mask: Tensor) -> Tensor:
    """Running sum of zeros and ones, as integers: (B, N) -> (B, N)."""
    batch, num_tokens = mask.shape
    groups = -(-num_tokens // GROUP)
    padded = F.pad(mask, (0, groups * GROUP - num_tokens))
    upper = torch.ones(GROUP, GROUP, device=mask.device).triu()
    inside = (padded.reshape(batch, groups, GROUP) @ upper).long()  # (B, groups, GROUP)
    totals = inside[:, :, -1]  # (B, groups)
    earlier = torch.ones(groups, groups, device=mask.device, dtype=torch.long).tril(-1)
    before = (totals[:, None, :] * earlier).sum(-1)  # (B, groups)
    return (inside + before[:, :, None]).reshape(batch, -1)[:, :num_tokens]


def _rows(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.shape[0], device=tensor.device)[:, None]  # (B, 1)
