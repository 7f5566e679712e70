"""Many runs of one graph that share what comes before: against running the whole graph each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from diffcr_compile.calibrate.shared_prefix import SharedPrefix


class Scale(nn.Module):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class InPlace(Scale):
    """Writes into what it is given, as some blocks do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.factor).sin_()


class Chain(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = Scale(), last

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        z = x + y
        return self.last(z), x


class Modules(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, _: str) -> bool:
        return isinstance(m, Scale)


def check(last: nn.Module) -> None:
    model = Chain(last)
    module = fx.GraphModule(model, Modules().trace(model))
    program: Any = SimpleNamespace(module=module, graph=module.graph)
    calls: list[int] = []
    module.first.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    runs = SharedPrefix(program)
    place = next(n for n in module.graph.nodes if n.target == "last")
    with torch.no_grad():
        runs.begin(inputs)
        runs.go_to(place)
        for factor in (0.5, 3.0, 0.5):
            module.last.factor = factor
            expected = Chain(last)(*(t.clone() for t in inputs))
            for found, wanted in zip(runs.rest(), expected, strict=True):
                assert torch.equal(found, wanted)
    again = 3 if isinstance(last, InPlace) else 0  # runs after which the values were made anew
    assert len(calls) == 1 + again


def test_the_rest_is_run_as_often_as_it_is_asked_for() -> None:
    check(Scale())


def test_a_block_that_writes_into_its_input_does_not_spoil_the_next_run() -> None:
    check(InPlace())
