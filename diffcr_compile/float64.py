"""Run a module in float64 throughout, also where it asks for another precision.

Rounding then is 1e-15, so that a number of 1e-8 is a fact about the module and not about rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffcr_compile.blocks import Path, map_leaves
from diffcr_compile.copied import copied

_WIDE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}


class Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every op computes in float64: ``x.float()`` inside a block leaves x as it is."""

    supports_higher_order_operators = True  # flex attention

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Flex attention compiles itself, and Dynamo never again after it met a mode that is not."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _WIDE:
            kwargs["dtype"] = _WIDE[kwargs["dtype"]]
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if not func._schema.is_mutable:  # a tensor that is no buffer has kept its type
            args, kwargs = pytree.tree_map_only(Tensor, widened, (args, kwargs))
        return pytree.tree_map_only(Tensor, widened, func(*args, **kwargs))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in complex128; integers as they are."""
    return tensor.to(_WIDE[tensor.dtype]) if tensor.dtype in _WIDE else tensor


def float64_copy(module: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode."""
    return copied(module).double().eval()


def float64_tree(tree: Any) -> Any:
    """Nested tuples, lists and dicts with every floating tensor in float64."""

    def widen(_: Path, leaf: Any) -> Any:
        return widened(leaf) if isinstance(leaf, Tensor) else leaf

    return map_leaves(tree, widen)
