"""Makes the library of ``build.py`` a device called ``other``; for the whole process, so in one of its own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "other"


def register(library: str) -> torch.device:
    """The device."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_module=True, for_storage=True)
    Tensor.__deepcopy__ = _copying(Tensor.__deepcopy__)  # type: ignore[method-assign]
    nn.Parameter.__deepcopy__ = _copying(nn.Parameter.__deepcopy__)  # type: ignore[method-assign]
    return torch.device(NAME, 0)


def _module() -> types.ModuleType:
    """What torch asks ``torch.<device>`` for."""
    module = types.ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "manual_seed_all": None,
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
        "get_rng_state": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    return module


def _copying(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch copies storages of unknown devices through the CPU, and then refuses the mixture."""

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if self.device.type != NAME:
            return usual(self, memo)
        if id(self) not in memo:
            copied = self.detach().clone()
            learns = self.requires_grad
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = (
                nn.Parameter(copied, learns) if is_parameter else copied.requires_grad_(learns)
            )
        found: Tensor = memo[id(self)]
        return found

    return deepcopy
