"""Put the units that were left out of an export into its ONNX graph, as copies of the one before them.

The exporter translates op by op, so units of equal traces become equal nodes with other weights. That is checked on
the two units that were exported, and the whole graph is optimised afterwards: what is written is what an export of
all units would have written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir import tensor_adapters
from torch import Tensor, fx, nn

from diffcr_compile.export.copied_nodes import Copying, Values, like_nodes
from diffcr_compile.export.repeats import EXPORTED, Run, attribute, outer_values
from diffcr_compile.export.short_program import ShortProgram
from diffcr_compile.program import Program


class UnlikeUnitsError(Exception):
    """The units of a run did not become equal nodes; the program has to be exported as a whole."""


def regrow(model: ir.Model, program: Program, short: ShortProgram, prefix: str) -> None:
    """Make the graph of a shortened program that of the whole one, in place.

    Args:
        model: as it was exported, before any optimisation.
        program: the whole program.
        short: what was exported.
        prefix: of the names of weights in the graph.

    Raises:
        UnlikeUnitsError: see there. The model is spoilt then.
    """
    graph = model.graph
    count = len(graph.outputs) - len(short.marks)
    values = dict(zip(short.marks, graph.outputs[count:], strict=True))
    values |= dict(zip(program.signature.inputs, graph.inputs, strict=True))
    del graph.outputs[count:]
    for run in short.runs:
        _RunInGraph(graph, program, run, values, prefix).put_in()
    _order_weights(graph, program.module, prefix)
    _check_order(graph)


@dataclasses.dataclass
class _RunInGraph:
    """A run, and where its exported units lie in a graph.

    Attributes:
        graph: of the shortened program.
        program: the whole one.
        run: of units.
        values: the graph's values at the borders of units, and its inputs, by nodes of the program. What the last
            unit makes is added when it is there: the next run may read it.
        prefix: of the names of weights.
    """

    graph: ir.Graph
    program: Program
    run: Run
    values: dict[str, ir.Value]
    prefix: str

    def put_in(self) -> None:
        """Copy the nodes of the second unit for every unit that is missing, and let what follows read the last."""
        one, two = (self._made(unit) for unit in self.run.units[:EXPORTED])
        shared = {self.values[n.name] for n in self.run.shared if n.name in self.values}
        entries = [self.values[node.name] for node in self.run.entries()]
        first = self._nodes_between(shared | set(entries), one)
        second = self._nodes_between(shared | set(one), two)
        both = set(first) & set(second)  # the size of a shared input, say, which is taken once
        first, second = ([n for n in nodes if n not in both] for nodes in (first, second))
        known = dict(zip(entries, self._passed(one), strict=True)) | self._own(0, 1, first)
        if not like_nodes(first, second, known):
            raise UnlikeUnitsError(f"{len(first)} nodes are unlike {len(second)} others")
        inside = set(second)
        readers = [[use for use in v.uses() if use.node not in inside] for v in two]
        last = self._copied(second, one, two)
        for uses, value in zip(readers, last, strict=True):
            for use in uses:
                use.node.replace_input_with(use.idx, value)
        renamed = dict(zip(two, last, strict=True))
        self.values.update(zip(self._border_names(self.run.units[-1]), last, strict=True))
        self.graph.outputs[:] = [renamed.get(value, value) for value in self.graph.outputs]

    def _copied(
        self, nodes: Sequence[ir.Node], one: Sequence[ir.Value], two: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Put a copy of the nodes behind them for each unit that is missing; returns what the last makes.

        Nodes that stand together stay together: sizes of inputs stand before everything else.
        """
        stretches = _stretches(self.graph, set(nodes))
        made = list(two)
        for number in range(EXPORTED, len(self.run.units)):
            known = dict(zip(self._passed(one), self._passed(made), strict=True))
            known |= self._own(EXPORTED - 1, number, nodes)
            copying = Copying(known, self._names(number), f"_{number}")
            for stretch in stretches:
                copies = [copying.copy(node) for node in stretch.nodes]
                self.graph.insert_after(stretch.end, copies)
                stretch.end = copies[-1]
            made = [copying.values[value] for value in two]
        return made

    def _border_names(self, unit: Sequence[fx.Node]) -> list[str]:
        return [unit[place].name for place in self.run.borders]

    def _made(self, unit: Sequence[fx.Node]) -> list[ir.Value]:
        return [self.values[name] for name in self._border_names(unit)]

    def _passed(self, made: Sequence[ir.Value]) -> list[ir.Value]:
        by_place = dict(zip(self.run.borders, made, strict=True))
        return [by_place[place] for place in self.run.passed_on]

    def _nodes_between(self, given: set[ir.Value], made: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes that make values of others, in graph order."""
        found: set[ir.Node] = set()
        waiting = list(made)
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if value in given or node is None or node in found:
                continue
            found.add(node)
            waiting += [source for source in node.inputs if source is not None]
        return [node for node in self.graph if node in found]

    def _own(self, one: int, two: int, nodes: Sequence[ir.Node]) -> Values:
        """What the nodes of a unit read that is its own, weights and an open K -> its like in another unit."""
        weights, lengths = self._weights(one, two), self._lengths(one, two)
        read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
        found: Values = {}
        for value in read:
            if value.name in weights and value.is_initializer():
                found[value] = self._weight(value, weights[value.name])
            elif value in lengths:
                found[value] = lengths[value]
        return found

    def _weights(self, one: int, two: int) -> dict[str, str]:
        """Names of the weights of a unit in the graph -> those of another."""
        found = {}
        for a, b in self.run.targets(one, two):
            for name in weight_names(attribute(self.program.module, a)):
                found[f"{self.prefix}.{a}{name}"] = f"{self.prefix}.{b}{name}"
        return found

    def _lengths(self, one: int, two: int) -> Values:
        """The inputs that say K of a unit -> those of another."""
        pairs = zip(*(outer_values(self.run.units[n]) for n in (one, two)), strict=True)
        return {
            self.values[a.name]: self.values[b.name]
            for a, b in pairs
            if a.name in self.program.kept_inputs
        }

    def _weight(self, like: ir.Value, name: str) -> ir.Value:
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = attribute(self.program.module, name.removeprefix(f"{self.prefix}."))
        assert isinstance(tensor, Tensor)
        made = ir.Value(
            name=name,
            shape=like.shape,
            type=like.type,
            const_value=tensor_adapters.TorchTensor(tensor.detach(), name=name),
        )
        self.graph.register_initializer(made)
        return made

    def _names(self, number: int) -> dict[str, str]:
        """What the metadata of nodes call the second unit's modules and lines -> the same of another unit."""
        units = self.run.units
        lines = {
            a.name: b.name for a, b in zip(units[EXPORTED - 1], units[number], strict=True)
        }
        modules = self.run.targets(EXPORTED - 1, number)
        return lines | {f"{self.prefix}.{a}": f"{self.prefix}.{b}" for a, b in modules}


@dataclasses.dataclass
class _Stretch:
    """Nodes that stand together in a graph, and the last node that was put behind them."""

    nodes: list[ir.Node]
    end: ir.Node


def _stretches(graph: ir.Graph, nodes: set[ir.Node]) -> list[_Stretch]:
    found = []
    for inside, group in itertools.groupby(graph, lambda node: node in nodes):
        if inside:
            stretch = list(group)
            found.append(_Stretch(stretch, stretch[-1]))
    return found


def weight_names(part: object) -> list[str]:
    """What stands behind the name of a module in the names of its weights; nothing for a weight."""
    if not isinstance(part, nn.Module):
        return [""]
    named = itertools.chain(
        part.named_parameters(remove_duplicate=False),
        part.named_buffers(remove_duplicate=False),
    )
    return [f".{name}" for name, _ in named]


def _order_weights(graph: ir.Graph, module: nn.Module, prefix: str) -> None:
    """Weights in the order in which the exporter has them: parameters of the whole module, then buffers."""
    named: Iterable[tuple[str, Tensor]] = itertools.chain(
        module.named_parameters(), module.named_buffers()
    )
    places = {f"{prefix}.{name}": place for place, (name, _) in enumerate(named)}
    ordered = sorted(graph.initializers.items(), key=lambda i: places.get(i[0], len(places)))
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _check_order(graph: ir.Graph) -> None:
    """Raise UnlikeUnitsError unless every node stands behind those that it reads."""
    seen: set[ir.Node] = set()
    for node in graph:
        makers = {v.producer() for v in node.inputs if v is not None} - {None}
        if not makers <= seen:
            raise UnlikeUnitsError(f"{node.name} stands before what it reads")
        seen.add(node)
