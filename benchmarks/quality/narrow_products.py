"""bfloat16 products on a CPU that has no instructions for them.

There PyTorch multiplies bfloat16 matrices tens of times slower than float32 ones, and a run would take a day. Its sums
are in float32 anyway, where a product of two bfloat16 numbers is exact: from float32 kernels, with operands and
result rounded to bfloat16, the same products come that differ in the order of their sums only. Attention weights
stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of what autocast casts to bfloat16, all that the models of the comparison use.
PRODUCTS = (
    "linear",
    "matmul",
    "addmm",
    "mm",
    "bmm",
    "baddbmm",
    "conv2d",
    "scaled_dot_product_attention",
)


def emulated_products() -> torch.library.Library:
    """Have autocast on the CPU take float32 kernels, while what is returned is held."""
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        product = getattr(torch.ops.aten, name).default
        library.impl(name, _from_float32(product), "AutocastCPU")
    return library


def _from_float32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return product(*map(_rounded, args), **kwargs).bfloat16()

    return call


def _rounded(value: Any) -> Any:
    """A floating tensor as bfloat16 has it, in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.bfloat16().float()
    return value
