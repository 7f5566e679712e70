"""Fit shortcuts in closed form: the map of a given rank that is nearest to what a block adds to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcr_compile.shortcut import LinearShortcut

RIDGE = 1e-3  # of the mean eigenvalue of the token covariance


class ShortcutFit:
    """Reduced-rank regression of a block's change on its tokens, from sums over any number of them.

    With X the tokens and Y the changes, both centred, it is ``min |Y - X A|² + ridge |A|²`` over matrices A of rank r:
    the solution without a limit on the rank, projected onto the r directions in which its answers vary most (Izenman,
    "Reduced-rank regression for the multivariate linear model", 1975).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.token_sum = torch.zeros(width, dtype=torch.float64)
        self.change_sum = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, width, dtype=torch.float64)  # X^T X
        self.product = torch.zeros(width, width, dtype=torch.float64)  # X^T Y

    def add(self, tokens: Tensor, change: Tensor) -> None:
        """Both (B, N, C)."""
        x, y = tokens.double().flatten(0, 1), change.double().flatten(0, 1)
        self.count += len(x)
        self.token_sum += x.sum(0).cpu()
        self.change_sum += y.sum(0).cpu()
        self.square += (x.T @ x).cpu()
        self.product += (x.T @ y).cpu()

    @property
    def is_finite(self) -> bool:
        """Whether all that was added is finite."""
        return bool(self.square.isfinite().all() and self.product.isfinite().all())

    @torch.no_grad()
    def put_into(self, shortcut: LinearShortcut) -> None:
        """Set a shortcut's weights."""
        x, y = self.token_sum / self.count, self.change_sum / self.count
        square = self.square - self.count * torch.outer(x, x)
        product = self.product - self.count * torch.outer(x, y)
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-12)
        square = square + ridge * torch.eye(len(x), dtype=torch.float64)
        whole = torch.linalg.solve(square, product)  # (C, C)
        spread = product.mT @ whole  # of the answers: whole^T square whole
        ascending = torch.linalg.eigh((spread + spread.mT) / 2).eigenvectors
        directions = ascending.mT.flip(0)[: shortcut.down.out_features]  # (r, C)
        rank = len(directions)  # a rank above C leaves the rest at zero
        down = directions @ whole.mT
        shortcut.down.weight[:rank] = down.to(shortcut.down.weight)
        shortcut.up.weight[:, :rank] = directions.mT.to(shortcut.up.weight)
        shortcut.up.bias.copy_(y - directions.mT @ (down @ x))
