"""What the hand-written models of tests/models.py are made of; a block here has one property each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Plain attention; `rope` (..., N, head width) multiplies queries and keys, `mask` is (B, N)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, -1).unbind(2)
        )  # (B, L, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
        if rope is not None:
            q, k = q * rope, k * rope
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out(mixed)


class Block(nn.Module):
    """adaLN-Zero block: ``x + gate * attention``, ``x + gate * mlp``; joint streams welcome."""

    def __init__(self, width: int = 16, heads: int = 4, zero_gates: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Linear(width, 3 * width)
        if zero_gates:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rope: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        scale, gate_1, gate_2 = self.modulation(condition)[:, None].chunk(3, dim=-1)
        x = x + gate_1 * self.attention(self.mix(self.norm(x) * (1 + scale)), rope, mask)
        return x + gate_2 * self.mlp(self.norm(x))

    def mix(self, x: Tensor) -> Tensor:
        """A place for illegal things."""
        return x


class ConvBlock(Block):
    """Illegal: a depth-wise convolution over the token grid."""

    def __init__(self, width: int = 16, side: int = 6, **options: Any) -> None:
        super().__init__(width, **options)
        self.side, self.conv = side, nn.Conv2d(width, width, 3, padding=1, groups=width)

    def mix(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (-1, self.side))
        return self.conv(grid).flatten(2).transpose(1, 2)


class ConvMlp(nn.Module):
    """A feed-forward with a depth-wise convolution over the token grid inside."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, self.up, self.down = side, nn.Linear(width, width), nn.Linear(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.up(x).transpose(1, 2).unflatten(2, (-1, self.side))
        return self.down(self.conv(grid).flatten(2).transpose(1, 2))


class ConvMlpBlock(ConvBlock):
    """Illegal, and so is every part of it."""

    def __init__(self, width: int = 16, side: int = 6, **options: Any) -> None:
        super().__init__(width, side, **options)
        self.mlp = ConvMlp(width, side)


class Conv1dBlock(Block):
    """Illegal, and runs on any number of tokens: only the permutation test can tell."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(width, **options)
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class WindowBlock(Block):
    """Illegal: attends inside windows of 9 neighbouring tokens."""

    def mix(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 9))
        return (windows + windows.mean(2, keepdim=True)).flatten(1, 2)


class TemporalBlock(Block):
    """Illegal: mixes the same token of neighbouring samples (frames folded into the batch)."""

    def mix(self, x: Tensor) -> Tensor:
        frames = x.unflatten(0, (-1, 2))
        return (frames + frames.mean(1, keepdim=True)).flatten(0, 1)


class FixedGridBlock(Block):
    """Illegal: permutes well, but a learned table pins the number of tokens."""

    def __init__(self, width: int = 16, num_tokens: int = 36) -> None:
        super().__init__(width)
        self.table = nn.Parameter(torch.ones(1, num_tokens, 1), requires_grad=False)
        self.register_buffer("count", torch.ones(1, num_tokens, 1))

    def mix(self, x: Tensor) -> Tensor:
        return x * self.count


class Embedding(nn.Module):
    """Sample (B, 2, S, S) -> tokens (B, N, C) and timestep -> condition (B, C)."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 1)
        self.time = nn.Linear(1, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, side * side, width))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.patch(x).flatten(2).transpose(1, 2) + self.position, self.time(t[:, None])


class OwnDiT(nn.Module):
    """Patchify, blocks, un-patchify; the subclasses say what the blocks are given."""

    def __init__(
        self, block: Callable[..., nn.Module] = Block, width: int = 16, side: int = 6,
        depth: int = 2, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(1)
        self.width, self.side = width, side
        self.embed = Embedding(width, side)
        self.blocks = nn.ModuleList([block(width=width, **options) for _ in range(depth)])
        self.head = nn.Linear(width, 2)

    @property
    def num_tokens(self) -> int:
        return self.side**2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.image(tokens)

    def image(self, tokens: Tensor) -> Tensor:
        return self.head(tokens).transpose(1, 2).unflatten(2, (self.side, self.side))


def inputs_for(side: int = 6, **more: Any) -> dict[str, Any]:
    return {"x": randn(2, 2, side, side), "t": torch.tensor([0.2, 0.7]), **more}


class TableBlock(Block):
    """Scales tokens by a table that may have a batch axis or not: (N, C) or (B, N, C)."""

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * torch.cat([rope] * 4, dim=-1), condition)


class CrossBlock(Block):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(  # type: ignore[override]
        self, x: Tensor, text: Tensor, condition: Tensor, rope: Tensor | None = None
    ) -> Tensor:
        key, value = self.kv(text).chunk(2, dim=-1)
        x = x + (self.q(x) @ key.transpose(1, 2)).softmax(-1) @ value
        return super().forward(x, condition, rope)


class NestedBlock(Block):
    """Takes its condition in a dict and returns a tuple (text, image), as SD3 and FLUX do."""

    def forward(self, data: dict[str, Any], extra: list[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        image, text = data["streams"]["image"], data["streams"]["text"]
        both = super().forward(torch.cat([text, image], dim=1), extra[0])
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class SingleModulationBlock(Conv1dBlock):
    """Illegal, and its gate comes from outside, as in PixArt (adaLN-single)."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        scale, gate = modulation[:, None].chunk(2, dim=-1)
        return x + gate * self.attention(self.mix(self.norm(x) * (1 + scale)))


class PoolBlock(Block):
    """Returns half the tokens, so no token can bypass it."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition)[:, ::2]
