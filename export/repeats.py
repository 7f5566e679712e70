"""Where a program repeats itself: consecutive units that compute the same with other weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffcr_compile.dynamo_state import forgotten_failures
from diffcr_compile.export.units import Unit, cut_into_units
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.planning.op_trace import OpTrace, buffer_contents
from diffcr_compile.program import Program

# Of each run this many units are exported: the first, and one whose predecessor is like itself.
EXPORTED = 2
WEIGHTS = ("call_module", "get_attr")


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive units of equal structure.

    Attributes:
        units: in the order in which they run; nodes at one place of two units correspond.
        passed_on: places of the values that a unit gives to the next.
        left: places of the values of the last unit that are read after the run.
        shared: tensors from before the run that every unit reads.
    """

    units: tuple[Unit, ...]
    passed_on: tuple[int, ...]
    left: tuple[int, ...]
    shared: tuple[fx.Node, ...]

    @property
    def borders(self) -> list[int]:
        """Places of the values of a unit that are read outside of it."""
        return sorted({*self.passed_on, *self.left})

    def entries(self) -> list[fx.Node]:
        """What the first unit gets in the place of a predecessor's values, in the order of `passed_on`."""
        first, second = (outer_values(unit) for unit in self.units[:2])
        predecessor = {node: place for place, node in enumerate(self.units[0])}
        given = {
            predecessor[b]: a for a, b in zip(first, second, strict=True) if b in predecessor
        }
        return [given[place] for place in self.passed_on]

    def handed_over(self) -> list[fx.Node]:
        """Values at the borders of the units that are exported."""
        made = [unit[place] for unit in self.units[:EXPORTED] for place in self.borders]
        return [*self.entries(), *made]

    def targets(self, one: int, two: int) -> list[tuple[str, str]]:
        """Modules and weights of a unit by name, each with its like in another one."""
        pairs = zip(self.units[one], self.units[two], strict=True)
        return [(str(a.target), str(b.target)) for a, b in pairs if a.op in WEIGHTS]


def find_repeats(program: Program) -> list[Run]:
    """Runs of more than ``EXPORTED`` units that have equal traces on fake tensors, with one K for all that are open.

    A unit that treats some K unlike its neighbours do is not seen here; parity with FROZEN is at the K of every bucket.
    """
    units = cut_into_units(program)
    if len(units) <= EXPORTED:
        return []
    try:
        traces, tensors = _traces(program, units)
    except Exception:  # noqa: BLE001 - the user's block may raise anything; the export will say it in words
        return []
    shared = _shared_weights(program, units)
    keys = [
        None if shared & _weight_ids(program, unit) else (_form(unit), traces[n])
        for n, unit in enumerate(units)
    ]
    runs = []
    for key, group in itertools.groupby(range(len(units)), lambda n: keys[n]):
        if key is not None:
            runs += _connected(program, [units[n] for n in group], tensors)
    return runs


def outer_values(unit: Unit) -> list[fx.Node]:
    """What a unit reads from outside, in order of first use."""
    inside = set(unit)
    read = dict.fromkeys(source for node in unit for source in node.all_input_nodes)
    return [source for source in read if source not in inside]


def _connected(program: Program, units: Sequence[Unit], tensors: set[fx.Node]) -> list[Run]:
    """Runs of these consecutive units of equal form, each of which passes tensors to the next one only."""
    links = [None, *(_link(program, one, two) for one, two in itertools.pairwise(units))]
    starts = [
        n for n, link in enumerate(links) if link is None or link != links[n - 1] is not None
    ]
    runs = []
    for start, end in itertools.pairwise([*starts, len(units)]):
        if end - start > EXPORTED:
            runs.append(_run(units[start:end], links[end - 1] or (), tensors))
    return [run for run in runs if set(run.handed_over()) <= tensors]


def _run(units: Sequence[Unit], link: tuple[Any, ...], tensors: set[fx.Node]) -> Run:
    inside = set(units[-1])
    left = [n for n, node in enumerate(units[-1]) if not set(node.users) <= inside]
    return Run(
        units=tuple(units),
        passed_on=tuple(sorted(entry for entry in link if isinstance(entry, int))),
        left=tuple(left),
        shared=tuple(n for n in link if isinstance(n, fx.Node) and n in tensors),
    )


def _link(program: Program, one: Unit, two: Unit) -> tuple[Any, ...] | None:
    """Where each outer value of `two` comes from: a place in `one`, an open K of its own, or the node itself.

    None if `one` is read by others than `two`, or reads something else in the place of what both share.
    """
    places = {node: place for place, node in enumerate(one)}
    readers = {user for node in one for user in node.users}
    if not readers <= {*one, *two}:
        return None
    link: list[Any] = []
    for mine, before in zip(outer_values(two), outer_values(one), strict=True):
        if mine in places:
            link.append(places[mine])
        elif mine.name in program.kept_inputs and set(mine.users) <= set(two):
            link.append("its own K")
        elif mine is before:
            link.append(mine)
        else:
            return None
    return tuple(link)


def _form(unit: Unit) -> str:
    """What a unit calls on what, by places in the unit and by numbers of outer values."""
    names = {node: f"%{place}" for place, node in enumerate(unit)}
    names |= {node: f"outer {number}" for number, node in enumerate(outer_values(unit))}
    lines = []
    for node in unit:
        target = "" if node.op in WEIGHTS else node.target
        args = fx.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
        lines.append(f"{node.op} {target} {args}")
    return "\n".join(lines)


class _Name(str):
    """A node's name inside a unit, told apart from an argument that is text."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _traces(program: Program, units: Sequence[Unit]) -> tuple[list[str], set[fx.Node]]:
    """A digest of what each unit computes on fake tensors, and the nodes whose values are tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    present = [program.block(block).num_tokens for block in program.kept_inputs.values()]
    length = max(1, min(present, default=0) // 2)
    given = [
        mode.from_tensor(tensor[:1].expand(length) if name in program.kept_inputs else tensor)
        for name, tensor in program.example.items()
    ]
    trace = OpTrace()
    traced = _Traced(program, units, trace)
    with kept_caches(program.module), forgotten_failures(), torch.no_grad(), mode, trace:
        traced.run(*given, enable_io_processing=False)
    tensors = {node for node, value in traced.env.items() if isinstance(value, Tensor)}
    return traced.digests, tensors


class _Traced(fx.Interpreter):
    """Runs the outer graph and notes the trace of each unit."""

    def __init__(self, program: Program, units: Sequence[Unit], trace: OpTrace) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.digests: list[str] = []
        self._trace = trace
        self._starts = {unit[0]: unit for unit in units}
        self._ends = {unit[-1]: unit for unit in units}
        self._weights = {unit[0]: _weights(program, unit) for unit in units}

    def run_node(self, n: fx.Node) -> Any:
        if n in self._starts:
            holder = self._weights[n]
            outer = [self.env[source] for source in outer_values(self._starts[n])]
            self._trace.start(holder, outer, buffer_contents(holder))
        result = super().run_node(n)
        if n in self._ends:
            values = [self.env.get(node, result) for node in self._ends[n]]
            self.digests.append(self._trace.stop(values))
        return result


def _weights(program: Program, unit: Unit) -> nn.Module:
    """The modules and weights that a unit uses, named by their places in it."""
    holder = nn.Module()
    for place, node in enumerate(unit):
        if node.op not in WEIGHTS:
            continue
        value = attribute(program.module, str(node.target))
        if isinstance(value, nn.Module):
            holder.add_module(f"at_{place}", value)
        elif isinstance(value, nn.Parameter):
            holder.register_parameter(f"at_{place}", value)
        else:
            assert isinstance(value, Tensor)
            holder.register_buffer(f"at_{place}", value)
    return holder


def attribute(owner: nn.Module, target: str) -> object:
    """A module or tensor by its qualified name."""
    value: object = owner
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _weight_ids(program: Program, unit: Unit) -> set[int]:
    return {id(tensor) for tensor in _tensors(_weights(program, unit))}


def _shared_weights(program: Program, units: Iterable[Unit]) -> set[int]:
    """Weights that more than one unit uses, or the graph outside of the units."""
    units = list(units)
    inside = {node for unit in units for node in unit}
    rest = tuple(node for node in program.graph.nodes if node not in inside)
    count = Counter(n for unit in (*units, rest) for n in _weight_ids(program, unit))
    return {weight for weight, times in count.items() if times > 1}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
