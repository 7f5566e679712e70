"""Which parameters of a user's model ask for gradients is the user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def requires_grad_kept(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters, which ask for gradients or not as they did before when the context ends, however it does."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield [parameter for parameter, _ in before]
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
