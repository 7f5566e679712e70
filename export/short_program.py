"""A program without the units that repeat, and the values where they are to be put in again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from diffcr_compile.blocks import leaves
from diffcr_compile.export.repeats import EXPORTED, WEIGHTS, Run, attribute
from diffcr_compile.program import Program


@dataclasses.dataclass(frozen=True)
class ShortProgram:
    """What is exported in the place of a program, and what must be put in again.

    Attributes:
        module: takes the program's tensors; gives its outputs, then the values of `marks`.
        runs: whose units from the third on were left out.
        marks: values at the borders of units, by the names of their nodes.
    """

    module: nn.Module
    runs: Sequence[Run]
    marks: tuple[str, ...]


def shortened(program: Program, runs: Sequence[Run]) -> ShortProgram:
    """The program with the first ``EXPORTED`` units of each run."""
    graph = program.copy_graph()
    nodes = {node.name: node for node in graph.nodes}
    for run in runs:
        kept, last = run.units[EXPORTED - 1], run.units[-1]
        for place in run.left:
            nodes[last[place].name].replace_all_uses_with(nodes[kept[place].name])
        for unit in reversed(run.units[EXPORTED:]):
            for node in reversed(unit):
                graph.erase_node(nodes[node.name])
    borders = dict.fromkeys(node.name for run in runs for node in _borders(run))
    left_out = {node.name for run in runs for unit in run.units[EXPORTED:] for node in unit}
    marks = tuple(name for name in borders if name not in left_out)
    output = graph.output_node()
    results = [leaf for _, leaf in leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    output.args = ((*results, *(nodes[name] for name in marks)),)
    graph.set_codegen(fx.graph.CodeGen())
    return ShortProgram(_Positional(program, graph), runs, marks)


def _borders(run: Run) -> list[fx.Node]:
    """Values between which the nodes of a unit lie; inputs and weights need no mark."""
    return [n for n in (*run.shared, *run.handed_over()) if n.op.startswith("call_")]


class _Positional(nn.Module):
    """A graph as a module that takes and returns nothing but tensors, in the order of the program's inputs.

    Its weights have the names that they have in the export of the whole program.
    """

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        super().__init__()
        root = {
            str(node.target): attribute(program.module, str(node.target))
            for node in graph.nodes
            if node.op in WEIGHTS
        }
        self.graph_module = fx.GraphModule(root, graph).train(program.module.training)
        self._inputs = list(program.signature.inputs)
        self._order = [node.name for node in graph.find_nodes(op="placeholder")]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self._inputs, tensors, strict=True))
        found = self.graph_module(*(named[name] for name in self._order))
        return tuple(value for value in found if isinstance(value, torch.Tensor))
