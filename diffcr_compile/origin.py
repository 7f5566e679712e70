"""The user's model as it was when it was routed, so that it can be given back as it was.

A routed graph shares the model's modules; nothing is put on the model itself. What using the graph may
still leave on shared modules (the training switch, gradients) is noted here and put right by
:meth:`Origin.restore`. Weights are watched by torch's own change counters: no copy, no hashing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import UsageError

SHOWN = 3


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A parameter or buffer at the time of the capture; only what tells a change is kept."""

    tensor: Tensor
    address: int
    version: int
    requires_grad: bool
    had_gradient: bool

    @property
    def changed(self) -> bool:
        return (_address(self.tensor), self.tensor._version) != (self.address, self.version)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The user's model, and what is needed to give it back.

    Attributes:
        model: as the user gave it.
        captured: what the graph was cut out of: `model` itself, or a copy with its adapters fused.
        routing: the settings that it was routed with.
        training: each module of the model with its training switch.
        seen: each parameter and buffer, by name.
    """

    model: nn.Module
    captured: nn.Module
    routing: RoutingConfig
    training: tuple[tuple[nn.Module, bool], ...]
    seen: dict[str, _Seen]

    @classmethod
    def of(cls, model: nn.Module, captured: nn.Module, routing: RoutingConfig) -> Origin:
        """The model as it is now."""
        return cls(
            model,
            captured,
            routing,
            tuple((module, module.training) for module in model.modules()),
            {name: _seen(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # a copy of a graph still comes from the one model

    def changed_weights(self) -> list[str]:
        """Names of the weights that were replaced or written to since."""
        now = self.model.state_dict(keep_vars=True)
        return [
            name
            for name, seen in self.seen.items()
            if now.get(name) is not seen.tensor or seen.changed
        ]

    def restore(self, accept_changes: bool = False) -> nn.Module:
        """The model with its own training switches and gradients.

        Raises:
            UsageError: weights were changed since, and `accept_changes` is False.
        """
        changed = self.changed_weights()
        if changed and not accept_changes:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise UsageError(
                f"{len(changed)} of {len(self.seen)} weights of {type(self.model).__name__} were changed "
                f"since it was routed: {', '.join(changed[:SHOWN])}{more}. A routed graph shares the "
                "model's weights (dcr.calibrate trains a copy of them, an optimizer over "
                "routed.parameters() does not). Load the model anew, or pass accept_changes=True to get "
                "it with the weights that it has now.",
                code="DCR-U050",
            )
        for module, training in self.training:
            module.training = training
        for seen in self.seen.values():
            if isinstance(seen.tensor, nn.Parameter):
                seen.tensor.requires_grad_(seen.requires_grad)
                if not seen.had_gradient:
                    seen.tensor.grad = None
        return self.model


def _seen(tensor: Tensor) -> _Seen:
    return _Seen(
        tensor,
        _address(tensor),
        tensor._version,
        tensor.requires_grad,
        tensor.grad is not None if tensor.is_leaf else False,
    )


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0
