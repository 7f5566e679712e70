"""Hand-written models: how tokens meet inside a block, what may be routed and what may not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import zoo
from tests.zoo.handwritten_parts import (
    SIDES,
    WIDTH,
    Attention,
    Block,
    Core,
    Mlp,
    Shell,
    Simple,
    angles,
    randn,
    sample_inputs,
    turn_real,
)

Example = tuple[nn.Module, dict[str, Any]]
POSITION = "mixes tokens by their position"


# ---------------------------------------------------------------------------- equal for any order


class LinearAttention(Attention):
    """Keys and values are summed over all tokens before a query sees them."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mixed = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2)[..., None])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class LinearBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LinearAttention()


@zoo("linear_attention", "handwritten")
def linear_attention(size: int) -> Example:
    return Simple(size, LinearBlock), sample_inputs(size)


class MeanBlock(Block):
    """Every token meets the mean of all tokens: pooling, but for any order and number."""

    def mix(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@zoo("global_mean", "handwritten")
def global_mean(size: int) -> Example:
    return Simple(size, MeanBlock), sample_inputs(size)


# --------------------------------------------------------------------------- mixture of experts


class Experts(nn.Module):
    """Three experts; the subclasses say who chooses whom."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.choice = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList([Mlp() for _ in range(count)])


class TopOneDense(Experts):
    """A token chooses its best expert; all experts run on all tokens, a one-hot picks."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.choice(x).softmax(-1)
        best = F.one_hot(probabilities.argmax(-1), len(self.experts)).to(x.dtype)
        every = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (every * (best * probabilities)[:, :, None]).sum(-1)


class TopOneSparse(Experts):
    """The same, but an expert runs on its own tokens only; their number depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, best = self.choice(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = best == number
            out[mine] = weight[mine, None] * expert(flat[mine])
        return out.view_as(x)


class ExpertChoice(Experts):
    """An expert chooses its best tokens, two thirds of them.

    Tokens compete for places, as they compete for attention. Who wins depends on their values, not on
    their places, and the number of places follows the number of tokens: legal.
    """

    def places(self, num_tokens: int) -> int:
        return max(1, 2 * num_tokens // len(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.choice(x).softmax(-1).transpose(1, 2)  # (B, E, N)
        weight, chosen = scores.topk(self.places(x.shape[1]), dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = chosen[:, number, :, None].expand(-1, -1, x.shape[2])
            out = out.scatter_add(
                1, rows, weight[:, number, :, None] * expert(x.gather(1, rows))
            )
        return out


class FirstComeFirstServed(TopOneDense):
    """Token choice with full experts (GShard, Switch): who comes too late in the row gets nothing.

    Illegal: which tokens are dropped depends on their place in the sequence.
    """

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.choice(x).softmax(-1)
        best = F.one_hot(probabilities.argmax(-1), len(self.experts)).to(x.dtype)
        places = x.shape[1] // len(self.experts)
        best = best * (best.cumsum(1) <= places)
        every = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (every * (best * probabilities)[:, :, None]).sum(-1)


class ExpertChoiceOverBatch(ExpertChoice):
    """Tokens of all samples compete, in the dense model too; still no place matters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)[None]).view_as(x)


class FixedPlaces(ExpertChoice):
    """Six places per expert whatever the number of tokens: five tokens are too few."""

    def places(self, num_tokens: int) -> int:
        return 6


class ExpertBlock(Block):
    def __init__(self, experts: type[Experts]) -> None:
        super().__init__()
        self.mlp = experts()


@zoo("experts_top_one_dense", "handwritten")
def experts_top_one_dense(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(TopOneDense)), sample_inputs(size)


@zoo("experts_top_one_sparse", "handwritten")
def experts_top_one_sparse(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(TopOneSparse)), sample_inputs(size)


@zoo("experts_choose_tokens", "handwritten")
def experts_choose_tokens(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(ExpertChoice)), sample_inputs(size)


@zoo("experts_choose_over_batch", "handwritten")
def experts_choose_over_batch(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(ExpertChoiceOverBatch)), sample_inputs(size)


@zoo("experts_with_fixed_places", "handwritten")
def experts_with_fixed_places(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(FixedPlaces)), sample_inputs(size)


@zoo("experts_first_come_first_served", "handwritten", refused=POSITION)
def experts_first_come_first_served(size: int) -> Example:
    return Simple(size, lambda: ExpertBlock(FirstComeFirstServed)), sample_inputs(size)


# ------------------------------------------------------------------------------ video, folded


class Frames(Simple):
    """Latte: frames are folded into the batch for one block, places for the next one, outside."""

    frames = 3

    def __init__(self, size: int) -> None:
        super().__init__(size, depth=3)
        self.moments = nn.Parameter(torch.randn(1, self.frames, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # x (B, 4, T, H, W)
        batch = x.shape[0]
        x, c = self.tokens(x.transpose(1, 2).flatten(0, 1)), self.time(t)
        for number, block in enumerate(self.blocks):
            if number % 2 == 0:  # (B T, N, C): tokens of one frame
                x = block(x, c.repeat_interleave(self.frames, dim=0))
                continue
            x = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)  # (B N, T, C)
            x = block(x + self.moments, c.repeat_interleave(self.num_tokens, dim=0))
            x = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
        return self.image(x).unflatten(0, (batch, -1)).transpose(1, 2)


def video_inputs(size: int) -> dict[str, Any]:
    pixels = 2 * SIDES[size]
    return sample_inputs(size) | {"x": randn(2, 4, Frames.frames, pixels, pixels)}


@zoo("frames_folded_outside", "handwritten")
def frames_folded_outside(size: int) -> Example:
    return Frames(size), video_inputs(size)


class FoldingBlock(Block):
    """The stream is (B, T N, C); frames are unfolded inside the block."""

    def mix(self, x: Tensor) -> Tensor:
        frames = x.unflatten(1, (Frames.frames, -1))
        return (frames + self.attention(frames.flatten(0, 1)).view_as(frames)).flatten(1, 2)


class FoldedInside(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # x (B, 4, T, H, W)
        batch = x.shape[0]
        x, c = self.tokens(x.transpose(1, 2).flatten(0, 1)), self.time(t)
        x = x.unflatten(0, (batch, -1)).flatten(1, 2)
        for block in self.blocks:
            x = block(x, c)
        x = self.image(x.unflatten(1, (Frames.frames, -1)).flatten(0, 1))
        return x.unflatten(0, (batch, -1)).transpose(1, 2)


@zoo("frames_folded_inside", "handwritten", refused=POSITION)
def frames_folded_inside(size: int) -> Example:
    return FoldedInside(size, FoldingBlock), video_inputs(size)


# ------------------------------------------------------------------------- layouts of the stream


class SequenceFirstBlock(nn.Module):
    """nn.MultiheadAttention as it is by default: (N, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 3)
        self.mlp = Mlp()
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.norm(x) * (1 + self.modulation(c))
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


class SequenceFirst(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x).transpose(0, 1), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x.transpose(0, 1))


@zoo("sequence_first", "handwritten")
def sequence_first(size: int) -> Example:
    return SequenceFirst(size, SequenceFirstBlock), sample_inputs(size)


class GridBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # x (B, H, W, C)
        return self.run(x.flatten(1, 2), c).view_as(x)


class Grid(Simple):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x).unflatten(1, (self.side, self.side)), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x.flatten(1, 2))


@zoo("stream_is_a_grid", "handwritten", refused="(batch, tokens, channels)")
def stream_is_a_grid(size: int) -> Example:
    """(B, H, W, C): some of the tokens are no grid."""
    return Grid(size, GridBlock), sample_inputs(size)


# ---------------------------------------------------------------------- by the tokens' positions


class ConvMlp(nn.Module):
    """Feed-forward with a depthwise 3 x 3 convolution over the grid."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.first(x).transpose(1, 2).unflatten(2, (-1, self.side))
        return self.second(F.silu(self.depthwise(grid)).flatten(2).transpose(1, 2))


class ConvBlock(Block):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.mlp = ConvMlp(side)


@zoo("depthwise_convolution", "handwritten", refused=POSITION)
def depthwise_convolution(size: int) -> Example:
    return Simple(size, lambda: ConvBlock(SIDES[size])), sample_inputs(size)


class WindowAttention(Attention):
    """Attention in windows of 2 x 2 tokens, shifted by one token if asked."""

    def __init__(self, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        half = self.side // 2
        grid = x.unflatten(1, (-1, self.side)).roll((-self.shift, -self.shift), (1, 2))
        windows = grid.unflatten(2, (half, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5)
        windows = windows.flatten(3, 4).flatten(0, 2)
        mixed = (
            super().forward(windows).unflatten(0, (x.shape[0], -1, half)).unflatten(3, (2, 2))
        )
        grid = mixed.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return grid.roll((self.shift, self.shift), (1, 2)).flatten(1, 2)


class WindowBlock(Block):
    def __init__(self, side: int, shift: int) -> None:
        super().__init__()
        self.attention = WindowAttention(side, shift)


class Windows(Simple):
    """Plain block, window, shifted window: only the first may be routed."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        side = SIDES[size]
        self.blocks = nn.ModuleList([Block(), WindowBlock(side, 0), WindowBlock(side, 1)])


@zoo("window_attention", "handwritten")
def window_attention(size: int) -> Example:
    return Windows(size), sample_inputs(size)


class WeakWindowBlock(Core):
    """Window attention behind a LayerScale that has hardly left its start of 1e-5."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.window = WindowAttention(side, 0)
        self.scale = nn.Parameter(1e-5 * (1 + 0.1 * torch.randn(WIDTH)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.scale * self.window(self.norm(x)) + self.mlp(self.norm(x) + c[:, None])


@zoo("weak_window_attention", "handwritten", refused=POSITION)
def weak_window_attention(size: int) -> Example:
    """Training may make the window strong, so it is refused however weak it is now."""
    return Simple(size, lambda: WeakWindowBlock(SIDES[size])), sample_inputs(size)


class ShiftBlock(Block):
    """Half of the channels come from the token before."""

    def mix(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([x[..., :half].roll(1, dims=1), x[..., half:]], dim=-1)


@zoo("token_shift", "handwritten", refused=POSITION)
def token_shift(size: int) -> Example:
    return Simple(size, ShiftBlock), sample_inputs(size)


class PoolAttention(nn.Module):
    """PoolFormer: the mean of the three neighbours in the row, minus the token."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        rows = x.transpose(1, 2)
        return (F.avg_pool1d(rows, 3, stride=1, padding=1) - rows).transpose(1, 2)


class PoolBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = PoolAttention()


@zoo("pooling", "handwritten", refused=POSITION)
def pooling(size: int) -> Example:
    return Simple(size, PoolBlock), sample_inputs(size)


class CausalBlock(Core):
    """A causal mask made inside from the number of tokens."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        n = x.shape[1]
        return self.run(x, c, mask=torch.ones(n, n, dtype=torch.bool, device=x.device).tril())


@zoo("causal_inside", "handwritten", refused=POSITION)
def causal_inside(size: int) -> Example:
    return Simple(size, CausalBlock), sample_inputs(size)


class RotaryInsideBlock(Core):
    """A rotary table made inside from the number of tokens: a kept token would get another place."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        table = torch.cat([angles(x.shape[1])] * 2, dim=-1).to(x)
        return self.run(x, c, rotate=lambda q: turn_real(q, table.cos(), table.sin()))


@zoo("rotary_inside", "handwritten", refused=POSITION)
def rotary_inside(size: int) -> Example:
    return Simple(size, RotaryInsideBlock), sample_inputs(size)


class OwnBiasBlock(Core):
    """A learned bias (H, N, N) of the block's own pins places and number of the tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, num_tokens, num_tokens))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.run(x, c, mask=self.bias)


@zoo("own_position_bias", "handwritten", refused=POSITION)
def own_position_bias(size: int) -> Example:
    return Simple(size, lambda: OwnBiasBlock(SIDES[size] ** 2)), sample_inputs(size)


class ViewBlock(Core):
    """Harmless, but the number of tokens is written into a view."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.run(x, c).view(x.shape[0], self.num_tokens, WIDTH)


@zoo("pinned_number_of_tokens", "handwritten", refused="it does not run on")
def pinned_number_of_tokens(size: int) -> Example:
    return Simple(size, lambda: ViewBlock(SIDES[size] ** 2)), sample_inputs(size)


class HiddenTableBlock(Core):
    """Reads a table that its model has put into an attribute: an argument nobody can cut."""

    table: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        cos, sin = (part.to(x) for part in self.table or ())
        return self.run(x, c, rotate=lambda q: turn_real(q, cos, sin))


class HiddenTable(Shell):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.blocks = nn.ModuleList([HiddenTableBlock(), HiddenTableBlock()])
        table = torch.cat([angles(self.num_tokens)] * 2, dim=-1)
        for block in self.blocks:
            block.table = (table.cos(), table.sin())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x)


@zoo("hidden_table", "handwritten", refused=POSITION)
def hidden_table(size: int) -> Example:
    return HiddenTable(size), sample_inputs(size)
