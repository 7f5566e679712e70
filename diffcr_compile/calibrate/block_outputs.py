"""Distil what each routed block puts out, not only what the model does at the end.

The teacher is the same graph over the same inputs, with every token kept and the weights as they were
before the calibration. Both graphs have a tap behind each routed block.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffcr_compile import routing
from diffcr_compile.passes.graph_edit import block_node, output_node, replace_uses
from diffcr_compile.program import Program, evaluating, identifier, run_flat, selector_name
from diffcr_compile.routing import Selection

SMALLEST = 1e-12  # mean square of an output that counts as nothing


class BlockOutputs:
    """A student whose block outputs can be compared with those of the dense model.

    Attributes:
        student: the program that was given, with taps; it has the same modules.
    """

    def __init__(self, program: Program, dense: Program) -> None:
        self.student, self._found = with_taps(program)
        self._dense, self._wanted = with_taps(dense)

    def distance(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean over samples and blocks of |routed - dense|² / |dense|², after the student's forward.

        Bypassed tokens count too. Each sample is normalised by itself, so that the mean over a batch
        is the mean over any parts of it.

        Args:
            inputs: of the student's last forward; the dense model runs on them now.
        """
        found = {name: tap.take() for name, tap in self._found.items()}
        # The student may share the blocks, and runs them again in a checkpointed backward.
        with torch.no_grad(), evaluating(self._dense.module):
            run_flat(self._dense, inputs)
        wanted = {name: tap.take() for name, tap in self._wanted.items()}
        with torch.autocast(next(iter(found.values())).device.type, enabled=False):
            each = [_relative_error(found[name], wanted[name]) for name in found]
            return torch.stack(each).mean()


def dense_twin(program: Program) -> Program:
    """A ROUTED program's dense model: the same modules as they are now, and every token kept.

    Make it before the program gets weights of its own. Its selectors keep all tokens whatever K and the
    gate are.
    """
    keeps_all = {selector_name(spec.name): KeepAll() for spec in program.blocks}
    return program.with_graph(program.copy_graph(), keeps_all)


def with_taps(program: Program) -> tuple[Program, dict[str, Tap]]:
    """The program with a tap behind each routed block, and the taps by block."""
    graph = program.copy_graph()
    taps: dict[str, Tap] = {}
    for spec in program.blocks:
        image = output_node(block_node(graph, spec.name), spec.output)
        assert image is not None  # InsertTokenRouters routes no block without one
        scatter = next(u for u in image.users if u.target is routing.scatter_tokens)
        taps[spec.name] = Tap()
        # behind all that the block puts out: a second branch of the block is blended into that first
        outputs = [
            u for u in block_node(graph, spec.name).users if u.target is operator.getitem
        ]
        with graph.inserting_after(max([*outputs, scatter])):
            seen = graph.call_module(_tap_name(spec.name), (scatter,))
        replace_uses(scatter, seen, keep=lambda user, seen=seen: user is seen)  # type: ignore[misc]
    modules: dict[str, nn.Module] = {_tap_name(name): tap for name, tap in taps.items()}
    tapped = program.with_graph(graph, modules)
    return tapped, taps


class Tap(nn.Module):
    """Hands on what it is given, and remembers it until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, stream: Tensor) -> Tensor:
        self.seen = stream
        return stream

    def take(self) -> Tensor:
        """What went through last."""
        seen, self.seen = self.seen, None
        assert seen is not None
        return seen


class KeepAll(nn.Module):
    """A selector that keeps every token, with a gate of exactly 1."""

    def forward(self, stream: Tensor) -> Selection:
        return Selection(None, None)


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    found, wanted = found.float().flatten(1), wanted.float().flatten(1)
    size = wanted.square().mean(1).clamp_min(SMALLEST)  # (B,)
    return ((found - wanted).square().mean(1) / size).mean()


def _tap_name(block: str) -> str:
    return f"{identifier(block)}_tap"
