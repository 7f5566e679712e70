"""Run every block at both bracketing bins and blend: the paper's estimator, as a graph rewrite."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch import fx
from torch.fx.node import map_arg

from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.errors import PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.passes.graph_edit import (
    block_node,
    gather_arguments,
    gather_bypassed,
    output_node,
    replace_uses,
    set_arguments,
)
from diffcr_compile.program import Program, Stage, selector_name, shortcut_name


@dataclasses.dataclass(frozen=True)
class BlendTwoBins(Pass):
    """Add a second, smaller branch to every routed block.

    Before:  ``out = scatter(x, index, block(gather(x, index)), gate)``
    After:   ``low = scatter(x, low_index, block(gather(x, low_index)), low_gate)``
             ``out = blend_bins(low, scatter(...), blend)``

    Twice the cost of a forward; used to compare with the one-forward ``boundary`` estimator.
    Source: You et al. 2025, section 3.3.
    """

    name: ClassVar[str] = "blend-two-bins"

    def requires(self, program: Program) -> None:
        if program.stage != Stage.ROUTED:
            raise PreconditionError(
                f"{self.name} needs a ROUTED program, got {program.stage.name}"
            )

    def run(self, program: Program) -> PassResult:
        if not program.blocks:
            return PassResult(program, 0)
        graph = program.copy_graph()
        for spec in program.blocks:
            _add_low_branch(graph, spec)
        return PassResult(program.with_graph(graph), len(program.blocks))


def _add_low_branch(graph: fx.Graph, spec: BlockSpec) -> None:
    block = block_node(graph, spec.name)
    image = output_node(block, spec.output)
    assert image is not None  # InsertTokenRouters routes no block without one
    scatter = next(u for u in image.users if u.target is routing.scatter_tokens)
    selection = next(iter(graph.find_nodes(op="call_module", target=selector_name(spec.name))))
    outputs = [user for user in block.users if user.target is operator.getitem]
    with graph.inserting_before(max([*outputs, scatter]).next):
        low_index, low_gate, blend = (
            graph.call_function(operator.getitem, (selection, field)) for field in (2, 3, 4)
        )
        low_block = _ungathered_copy(graph, block)
        kept = gather_arguments(graph, low_block, spec, low_index, suffix="_low")
        set_arguments(low_block, kept)
        low_kept = _rows_of_bypassed(graph, scatter, low_index, kept[spec.stream.path], spec)
        kept_nodes = list(kept.values())
        for node in kept_nodes:
            low_block.prepend(node)
        low_image = low_block
        for key in spec.output:
            low_image = graph.call_function(operator.getitem, (low_image, key))
        low = graph.call_function(
            routing.scatter_tokens,
            (
                scatter.args[0],
                low_index,
                low_kept,
                low_image,
                low_gate,
                *scatter.args[5:],
            ),
        )
        _blend(graph, low, scatter, blend)
        for other in outputs:  # text streams and the like
            if other is not image and other.users:
                low_other = graph.call_function(operator.getitem, (low_block, other.args[1]))
                _blend(graph, low_other, other, blend)


def _rows_of_bypassed(
    graph: fx.Graph, scatter: fx.Node, low_index: fx.Node, kept: fx.Node, spec: BlockSpec
) -> fx.Node | None:
    """Of the smaller bin, what :func:`scatter_tokens` calls `kept`."""
    base, base_kept = scatter.args[0], scatter.args[2]
    assert isinstance(base, fx.Node)
    if base_kept is None:
        return None
    has_shortcut = base.op == "call_module" and base.target == shortcut_name(spec.name)
    return gather_bypassed(graph, base, low_index, spec) if has_shortcut else kept


def _ungathered_copy(graph: fx.Graph, block: fx.Node) -> fx.Node:
    """A second call of the block on the arguments it had before it was routed."""

    def source(node: fx.Node) -> fx.Node:
        while node.target is routing.gather_tokens:
            node = node.args[0]  # type: ignore[assignment]
        return node

    args, kwargs = map_arg((block.args, block.kwargs), source)
    return graph.call_module(str(block.target), tuple(args), dict(kwargs))


def _blend(graph: fx.Graph, low: fx.Node, high: fx.Node, weight: fx.Node) -> None:
    blended = graph.call_function(routing.blend_bins, (low, high, weight))
    replace_uses(high, blended, keep=lambda user: user is blended)
