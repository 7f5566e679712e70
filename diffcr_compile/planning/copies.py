"""Copies of a model's modules with other weights: fake ones, the very same ones, random ones for none.

Nobody who works on a copy can change the user's model by accident, its hooks and its mode included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffcr_compile.copied import copied


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same modules with weights that have a shape and no data."""

    def fake(tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with mode:
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=False)  # some models switch gradients on
        return made

    return _copy(model, fake)


def shared_copy(model: nn.Module) -> nn.Module:
    """The same modules around the very same weights."""
    return _copy(model, lambda tensor: tensor)


def _copy(model: nn.Module, of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the modules in evaluation mode, with each tensor replaced by ``of(tensor)``."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return copied(model, {id(tensor): of(tensor) for tensor in tensors}).eval()


def fill_meta(module: nn.Module, leave: Collection[str] = ()) -> nn.Module:
    """Random values for weights on the meta device, in place; `leave` names submodules to leave.

    A submodule of a left block gets its values when the model calls it from outside.
    """
    left = {id(part) for name in leave for part in module.get_submodule(name).modules()}
    tops = {id(module.get_submodule(name)) for name in leave}
    for part in module.modules():
        if id(part) not in left:
            _fill(part)
        elif id(part) not in tops:
            part.register_forward_pre_hook(lambda called, _: _fill(called))
    return module


def _fill(part: nn.Module) -> None:
    for name, parameter in part._parameters.items():
        if parameter is not None and parameter.is_meta:
            part._parameters[name] = nn.Parameter(with_data(parameter), requires_grad=False)
    for name, buffer in part._buffers.items():
        if buffer is not None and buffer.is_meta:
            part._buffers[name] = with_data(buffer)


def with_data(leaf: Any) -> Any:
    """Random numbers of the same form for a tensor without data; anything else as it is."""
    if not isinstance(leaf, Tensor) or not leaf.is_meta:
        return leaf
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    generator = torch.Generator().manual_seed(leaf.numel())
    scale = leaf.shape[-1] ** -0.5 if isinstance(leaf, nn.Parameter) and leaf.ndim > 1 else 1.0
    return (scale * torch.randn(leaf.shape, generator=generator)).to(leaf.dtype)


def to_fake(leaf: Any, mode: FakeTensorMode) -> Any:
    """The form of a tensor without its data; anything else as it is."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
        return leaf
    return mode.from_tensor(leaf)
