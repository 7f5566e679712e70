"""What the hand-written models of the zoo are made of: 16 or 36 tokens, 24 channels, 3 heads.

Width, heads, width of a head (8), text tokens (5), batch (2) and both token counts differ, so that an
axis can be taken for another one only where a model makes two of them equal on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HEAD, TEXT, CHANNELS, PATCH = 24, 3, 8, 5, 4, 2
SIDES = (4, 6)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_inputs(size: int, **more: Any) -> dict[str, Any]:
    """Latents ``x`` and timesteps ``t`` of two different samples."""
    pixels = SIDES[size] * PATCH
    x = randn(2, CHANNELS, pixels, pixels)
    return {"x": x, "t": torch.tensor([120.0, 730.0]), **more}


def text_states(seed: int = 1) -> Tensor:
    return randn(2, TEXT, WIDTH, seed=seed)


def sinusoid(t: Tensor, width: int = 16) -> Tensor:
    """Timesteps of any shape -> (..., width)."""
    frequencies = torch.exp(torch.arange(width // 2, device=t.device) * (-9.2 / (width // 2)))
    angles = t[..., None] * frequencies.to(t)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.second(F.silu(self.first(sinusoid(t))))


Score = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Softmax attention. `rotate` turns queries and keys (B, H, L, D), `mask` is added or boolean."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotate: Score | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        key, value = self.kv(text).chunk(2, dim=-1)
        return (self.q(x) @ key.transpose(1, 2)).softmax(-1) @ value


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Core(nn.Module):
    """adaLN block; what its subclasses take and return is what they are about.

    The condition of :meth:`run` is (B, C), or (B, N, C) with one modulation per token.
    """

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention: nn.Module = Attention(width, heads)
        self.mlp: nn.Module = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def run(self, x: Tensor, condition: Tensor, **attention: Any) -> Tensor:
        parts = self.modulation(F.silu(condition))
        parts = parts[:, None] if parts.ndim == 2 else parts
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts.chunk(6, dim=-1)
        mixed = self.attention(self.mix(self.norm(x) * (1 + scale_1) + shift_1), **attention)
        x = x + (1 + gate_1) * mixed
        return x + (1 + gate_2) * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)

    def mix(self, x: Tensor) -> Tensor:
        """A place where tokens may meet in other ways than by attention."""
        return x


class Block(Core):
    """The common case: ``block(x, c)``."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.run(x, c)


class Shell(nn.Module):
    """Patches and timestep in, image out; the loop over the blocks is the subclass's."""

    def __init__(self, size: int, width: int = WIDTH) -> None:
        super().__init__()
        self.side = SIDES[size]
        self.patches = nn.Conv2d(CHANNELS, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.5 * torch.randn(1, self.side**2, width))
        self.time = TimeEmbedding(width)
        self.head = nn.Linear(width, PATCH * PATCH * CHANNELS)

    @property
    def num_tokens(self) -> int:
        return self.side**2

    def tokens(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.position

    def image(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, 4, H, W)."""
        grid = self.head(tokens).unflatten(2, (PATCH, PATCH, -1))
        grid = grid.unflatten(1, (self.side, self.side))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Simple(Shell):
    """``for block in self.blocks: x = block(x, c)``."""

    def __init__(
        self, size: int, block: Callable[[], nn.Module] = Block, depth: int = 2
    ) -> None:
        super().__init__(size)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = self.step(block, x, c)
        return self.image(x)

    def step(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        return block(x, c)


# ------------------------------------------------------------------------------- rotary tables


def angles(num_tokens: int) -> Tensor:
    """(N, D / 2)."""
    return torch.arange(num_tokens)[:, None] * torch.tensor([1.0, 0.4, 0.15, 0.05])


def turn_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves; the tables broadcast against (B, H, L, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def turn_complex(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs; the complex table broadcasts against (B, H, L, D / 2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)
