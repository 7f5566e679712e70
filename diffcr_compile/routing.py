"""The routing ops: score tokens, select the best K, gather them, put the processed ones back.

Per routed block (design section 4), with s the logits of the router::

    index = top-k(s, K)                              # (B, K)
    kept  = x[index]                                 # (B, K, C), token-aligned arguments likewise
    y     = block(kept, ...)
    out   = x with rows `index` replaced by kept + gate * (y - kept)

Nothing sorts the index: a block is routed only if permuting its tokens permutes its output, so
their order cannot matter, and a sort would cost a second TopK in every block.

Source of the method: You et al., "Layer- and Timestep-Adaptive Differentiable Token Compression
Ratios for Efficient Diffusion Transformers" (CVPR 2025), after Mixture-of-Depths (Raposo et al. 2024).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcr_compile.large_topk import large_topk

Gate = Literal["straight_through", "paper"]


class TokenRouter(nn.Module):
    """One linear score per token, always in fp32 (TensorRT has no bf16 TopK; fewer ties).

    Written as weight x tokens^T: in tokens x weight^T ONNX Runtime packs the constant weight and pads its one
    column to sixteen, which takes 3 to 4 times as long.

    Args:
        width: channels C of the stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N, C) -> (B, N)
        logits = functional.linear(
            self.score.weight, tokens.float().flatten(0, 1)
        )  # (1, B * N)
        return logits.view(tokens.shape[:2])


class RandomRouter(nn.Module):
    """The control: every token is as likely as any other, anew at every call."""

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N, C) -> (B, N)
        return torch.randn(tokens.shape[:2], device=tokens.device)


class Selection(NamedTuple):
    """What a selector hands to the gathers and the scatter of its block.

    Attributes:
        positions: (B, K) of the kept tokens in the stream, best first; None when all are kept.
        gate: (B, K) weight of the residual minus 1; None when it is exactly 0.
        low_positions: the first K_low of `positions`, for the `two_bin` estimator; None otherwise.
        low_gate: the gate of `low_positions`.
        blend: weight in [0, 1] of the larger bin, for `two_bin`.
    """

    positions: Tensor | None
    gate: Tensor | None
    low_positions: Tensor | None = None
    low_gate: Tensor | None = None
    blend: Tensor | None = None


class TokenSelector(nn.Module):
    """Router and top-k of one block while K may still change; `freeze` replaces it by plain ops.

    Attributes:
        kept_tokens: K, 0 <= K <= num_tokens. With 0 the block runs on one token, because many blocks
            cannot run on none, and its work is thrown away.
        low_tokens: K_low < K, the next smaller bin, while keep ratios are learned; None otherwise.
        blend: weight in [0, 1] of the tokens ranked K_low to K. It carries the gradient of the
            keep ratio.
        blends_outputs: the `two_bin` estimator is at work; tokens are then not weighted here.
    """

    def __init__(
        self, router: nn.Module, num_tokens: int, start: int, *, shares_index: bool, gate: Gate
    ) -> None:
        super().__init__()
        self.router = router
        self.num_tokens = num_tokens
        self.start = start
        self.shares_index = shares_index
        self.gate: Gate = gate
        self.keep(num_tokens)

    def keep(self, kept_tokens: int) -> None:
        """Keep a fixed number of tokens from now on."""
        self.kept_tokens = kept_tokens
        self.low_tokens: int | None = None
        self.blend: Tensor | None = None
        self.blends_outputs = False

    def keep_between(self, low: int, high: int, blend: Tensor, *, two_bin: bool) -> None:
        """Keep `high` tokens, of which those ranked after `low` count with weight `blend`."""
        self.kept_tokens, self.low_tokens, self.blend = high, low, blend
        self.blends_outputs = two_bin

    def forward(self, stream: Tensor) -> Selection:  # (B, L, C)
        keeps_all = self.kept_tokens == self.num_tokens and self.low_tokens is None
        if keeps_all and not self.training and self.gate == "straight_through":
            return Selection(None, None)
        if self.kept_tokens == 0:
            nothing = stream.new_zeros(stream.shape[0], 1)
            return Selection(nothing.long(), nothing - 1)
        tokens = image_tokens(stream, self.start, self.num_tokens)
        # Calibration may autocast; scores stay fp32, as they are in the graph that is exported.
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.router(tokens)  # (B, N)
        if keeps_all:
            return Selection(None, self._gate(logits))
        index = select_tokens(logits, self.kept_tokens, self.shares_index)  # (B, K)
        gate = self._gate(logits.gather(1, index))
        if self.low_tokens is None or self.blend is None:
            return Selection(index, gate)
        if self.blends_outputs:
            low_gate = None if gate is None else gate[:, : self.low_tokens]
            return Selection(index, gate, index[:, : self.low_tokens], low_gate, self.blend)
        boundary = (
            torch.arange(self.kept_tokens, device=index.device) >= self.low_tokens
        )  # (K,)
        weight = torch.where(boundary, self.blend.to(index.device), 1.0)  # (K,)
        gate = weight.expand(index.shape) - 1 if gate is None else (1 + gate) * weight - 1
        return Selection(index, gate)

    def _gate(self, logits: Tensor) -> Tensor | None:
        if self.gate == "paper":
            return logits.sigmoid() - 1
        if not self.training:
            return None
        score = logits.sigmoid()
        return (
            score - score.detach()
        )  # 0 in value, so that keep ratio 1.0 stays the dense model


def image_tokens(stream: Tensor, start: int, num_tokens: int) -> Tensor:
    """The image tokens of a stream that may hold others too: (B, L, C) -> (B, N, C)."""
    if start == 0 and stream.shape[1] == num_tokens:
        return stream
    return stream[:, start : start + num_tokens]


def select_tokens(
    logits: Tensor, kept_tokens: int, shares_index: bool, max_topk: int | None = None
) -> Tensor:
    """Positions of the `kept_tokens` highest logits: (B, N) -> (B, K).

    With `shares_index` the mean over the batch decides, and all rows of the result are equal. Best
    first, but where a K above `max_topk` is said by the tokens that are bypassed: then ascending.
    """
    ranked = logits.mean(0, keepdim=True) if shares_index else logits  # (B or 1, N)
    if max_topk is None or kept_tokens <= max_topk:
        index = ranked.topk(kept_tokens, dim=1).indices  # (B or 1, K)
    else:
        index = large_topk(ranked, kept_tokens, max_topk)
    return index.expand(logits.shape[0], -1) if shares_index else index


def kept_length(reference: Tensor) -> int:
    """K as the length of a 1-D tensor (K,), whose values are never read.

    TensorRT then sees K in the shapes of its inputs, where an optimization profile fixes it.
    """
    return reference.shape[0]


def paper_gate(logits: Tensor, index: Tensor | None) -> Tensor:
    """sigmoid(logit) - 1 of the kept tokens: (B, N), (B, K) -> (B, K)."""
    kept = logits if index is None else logits.gather(1, index)
    return kept.sigmoid() - 1


def gather_tokens(
    tensor: Tensor, index: Tensor | None, axis: int, start: int, num_tokens: int, batched: bool
) -> Tensor:
    """Cut the N image tokens on `axis` down to the K of `index` (B, K); other tokens stay."""
    if index is None:
        return tensor
    if batched and axis == 0:  # no batch axis yet: every sample gets its own cut
        tensor, axis = tensor[None], 1
    at = int(batched)
    moved = tensor.movedim(axis, at) if axis != at else tensor  # (B or 1, L, ...) or (L, ...)
    others = moved.shape[at] - num_tokens
    image = moved.narrow(at, start, num_tokens) if others else moved
    # (B, K, ...), or (K, ...) where every sample has the same index
    kept = _take_rows(image, index) if batched else image.index_select(0, index[0])
    if others:
        before = moved.narrow(at, 0, start)
        after = moved.narrow(at, start + num_tokens, others - start)
        if batched:
            before, after = (t.expand(index.shape[0], *t.shape[1:]) for t in (before, after))
        kept = torch.cat([before, kept, after], dim=at)
    return kept.movedim(at, axis) if axis != at else kept


def scatter_tokens(
    stream: Tensor,
    index: Tensor | None,
    kept: Tensor | None,
    processed: Tensor,
    gate: Tensor | None,
    start: int,
    num_tokens: int,
) -> Tensor:
    """Put the processed tokens back in their places; bypassed tokens are passed on unchanged.

    Args:
        stream: (B, L, C) as it came to the block; zeros for a part whose output is added to the stream.
        index: (B, K) from :func:`select_tokens`, None for "all kept".
        kept: (B, L - N + K, C), what the block was given; None for zeros.
        processed: what the block made of it.
        gate: (B, K) weight of the residual minus 1, None for a weight of exactly 1.
        start: position of the first image token in the stream.
        num_tokens: image tokens N of the stream.
    """
    other = stream.shape[1] - num_tokens
    if gate is not None:
        # Written so that a gate of exactly 0 leaves `processed` bit-equal.
        weight = gate if other == 0 else _zeros_for_neighbours(gate, start, other)
        change = processed if kept is None else processed - kept
        processed = processed + weight[..., None].to(processed.dtype) * change
    if index is None:
        return processed
    if other == 0:
        return _put_rows(stream, index, processed)
    end = start + index.shape[1]
    image = _put_rows(stream[:, start : start + num_tokens], index, processed[:, start:end])
    return torch.cat([processed[:, :start], image, processed[:, end:]], dim=1)


def nothing_added(stream: Tensor) -> Tensor:
    """What a part of a block adds to tokens that bypass it: zeros like its stream."""
    return torch.zeros_like(stream)


def blend_bins(low: Tensor, high: Tensor, weight: Tensor | None) -> Tensor:
    """``low + weight * (high - low)``: the two bracketing bins of the `two_bin` estimator.

    A weight of None says that there is no smaller bin, K is fixed.
    """
    if weight is None:
        return high
    return torch.lerp(low, high, weight.to(high))


def _take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """The tokens of `index` (B, K) from each sample of a tensor (B or 1, N, ...): (B, K, ...).

    The rows of all samples as one table: torch looks rows up several times faster than ``x[batch, index]``
    gathers them, and ONNX needs one Gather and no pairs of positions. (torch.gather would expand the index to
    the size of the data.)
    """
    samples, tokens, *rest = tensor.shape
    table = tensor.reshape(samples * tokens, math.prod(rest))
    at = index if samples == 1 else _in_table(index, tokens)
    return functional.embedding(at, table).view(*index.shape, *rest)


def _put_rows(tensor: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of (B, N, C) with the tokens of `index` (B, K) replaced by `rows` (B, K, C)."""
    # A patch embedding leaves its stream transposed in memory, and index_put keeps it so; a token's channels
    # would then lie N apart for every gather to come.
    table = tensor.contiguous().flatten(0, 1)  # (B * N, C)
    # autocast leaves what a block makes of its stream in another type
    if rows.dtype != table.dtype:
        kind = torch.promote_types(table.dtype, rows.dtype)
        table, rows = table.to(kind), rows.to(kind)
    return table.index_put((_in_table(index, tensor.shape[1]),), rows).view(tensor.shape)


def _in_table(index: Tensor, tokens: int) -> Tensor:
    """Positions (B, K) in each sample's tokens as row numbers of the table of all samples."""
    samples = index.shape[0]
    if samples == 1:
        return index
    firsts = torch.arange(0, samples * tokens, tokens, device=index.device)  # (B,)
    return index + firsts[:, None]


def _zeros_for_neighbours(gate: Tensor, start: int, other: int) -> Tensor:
    before = gate.new_zeros(gate.shape[0], start)
    after = gate.new_zeros(gate.shape[0], other - start)
    return torch.cat([before, gate, after], dim=1)
