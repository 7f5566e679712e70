"""Float32 on CUDA as float32: no TF32, which rounds what goes into a product to 10 bits.

By default torch computes convolutions in TF32 on CUDA, a patch embedding too. Answers that other executors are
held to must not be off by that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_FLAG, _PRECISION = "allow_tf32", "fp32_precision"
_FULL = {_FLAG: False, _PRECISION: "ieee"}


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 are not rounded while the context lasts; on a CPU they never are."""
    changed = [(o, n, value) for o, n, value in _settings() if value != _FULL[n]]
    try:
        for owner, name, _ in changed:
            setattr(owner, name, _FULL[name])
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps the precision of matrix products and of what cuDNN computes, and what it is."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return [(owner, _FLAG, getattr(owner, _FLAG)) for owner in (products, cudnn)]
    except RuntimeError:  # the user set it in torch 2.9's new way, and the flags cannot say it
        owners = (products, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined, unused-ignore]
        return [(owner, _PRECISION, getattr(owner, _PRECISION)) for owner in owners]
