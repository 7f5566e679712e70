"""What bypassed tokens get in the place of a block: as much of it as a matrix of low rank can say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffcr_compile.routing import image_tokens


def macs_per_token(width: int, rank: int) -> int:
    """Multiply-adds of a shortcut for one token, which are the numbers in its two matrices."""
    return 2 * width * rank


class LinearShortcut(nn.Module):
    """An affine map of low rank, token by token: ``x + up(down(x))``.

    Most of what a block adds to a token is a linear function of that token. Calibration fits the map in closed form
    (``calibrate/fit_shortcuts.py``) and trains it with the routers; until then it is zero, and bypassed tokens stay what
    they are. It is shared by the timestep buckets, as all weights are.

    Linear maps in the place of whole blocks: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and
    Transformer Block Linearization" (2025); for tokens of a DiT that change little from step to step: Liu et al.,
    "FastCache" (2025).

    Args:
        width: channels C of the stream.
        rank: of the map, at least 1; above C it says no more than at C.
        start: position of the first image token in the stream.
        num_tokens: image tokens N of the stream.
        adds: whether the block's output is the stream itself; else it is what the model adds to the stream, and so is
            the shortcut's.
    """

    def __init__(
        self, width: int, rank: int, start: int, num_tokens: int, *, adds: bool
    ) -> None:
        super().__init__()
        self.start, self.num_tokens, self.adds = start, num_tokens, adds
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def change(self, tokens: Tensor) -> Tensor:
        """What the block adds to image tokens, as far as the map can say it: (B, N, C) -> (B, N, C)."""
        found: Tensor = self.up(self.down(tokens.to(self.down.weight.dtype)))
        return found.to(tokens.dtype)

    def forward(self, stream: Tensor) -> Tensor:  # (B, L, C) -> (B, L, C)
        """The stream as it is where every image token bypasses the block; other tokens stay."""
        tokens = image_tokens(stream, self.start, self.num_tokens)
        image = tokens + self.change(tokens) if self.adds else self.change(tokens)
        if tokens is stream:
            return image
        others = stream if self.adds else torch.zeros_like(stream)
        after = self.start + self.num_tokens
        return torch.cat([others[:, : self.start], image, others[:, after:]], dim=1)
