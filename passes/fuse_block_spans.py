"""Let consecutive blocks share one router, one gather and one scatter."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx, nn

from diffcr_compile.blocks import (
    BlockSpec,
    Path,
    TokenAxis,
    leaves,
    map_leaves,
)
from diffcr_compile.errors import PostconditionError, PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.passes.graph_edit import argument, block_node, output_node, replace_uses
from diffcr_compile.program import Program, Stage, identifier


@dataclasses.dataclass(frozen=True)
class FuseBlockSpans(Pass):
    """Make one routing unit of up to `length` consecutive blocks.

    Before:  ``y = block_0(x, rope, c)``
             ``z = block_1(y, rope, c)``
    After:   ``z = span(x, rope, c)``     span = block_0, then block_1

    A routed unit reads and writes the whole stream once, so a span of two costs half as much to
    route as two blocks; its blocks work on the same tokens. Permuting the tokens permutes the output
    of each block, hence that of the span: it needs no test of its own. Where something else reads the
    stream between two blocks (a long skip, a control branch), the span ends.

    Args:
        length: most blocks per span, at least 1. Spans are counted from the last block backwards, so
            that what is left over stands at the front, where blocks keep the most tokens.
    """

    name: ClassVar[str] = "fuse-block-spans"
    length: int = 1

    def requires(self, program: Program) -> None:
        if program.stage != Stage.CAPTURED:
            raise PreconditionError(
                f"{self.name} needs a CAPTURED program, got {program.stage.name}"
            )
        if self.length < 1:
            raise PreconditionError(
                f"{self.name}: length must be at least 1, got {self.length}"
            )

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        spans: dict[str, nn.Module] = {}
        specs = []
        for chain in _chains(graph, program.blocks):
            for members in _parts(chain, self.length):
                if len(members) == 1:
                    specs.append(members[0])
                    continue
                spec, module = _fuse(program, graph, members)
                spans[spec.name] = module
                specs.append(spec)
        if not spans:
            return PassResult(program, 0)
        fused = program.with_graph(graph, spans, blocks=tuple(specs))
        return PassResult(fused, len(spans))

    def ensures(self, program: Program) -> None:
        too_long = [spec.name for spec in program.blocks if len(spec.members) > self.length]
        if too_long:
            raise PostconditionError(
                f"{self.name}: more than {self.length} blocks in {too_long}"
            )


def _chains(graph: fx.Graph, blocks: Sequence[BlockSpec]) -> list[list[BlockSpec]]:
    """Runs of blocks of which each works on nothing but the output of the one before."""
    chains: list[list[BlockSpec]] = []
    for spec in blocks:
        if chains and _follows(graph, chains[-1][-1], spec):
            chains[-1].append(spec)
        else:
            chains.append([spec])
    return chains


def _parts(chain: list[BlockSpec], length: int) -> list[list[BlockSpec]]:
    first = len(chain) % length
    parts = [chain[:first]] if first else []
    return parts + [chain[i : i + length] for i in range(first, len(chain), length)]


def _follows(graph: fx.Graph, one: BlockSpec, two: BlockSpec) -> bool:
    if "zeros" in (one.bypass, two.bypass):  # what is added to a stream is not one
        return False
    sizes = [(s.num_tokens, s.width, s.stream.start) for s in (one, two)]
    if sizes[0] != sizes[1]:
        return False
    first, second = block_node(graph, one.name), block_node(graph, two.name)
    image = output_node(first, one.output)
    if image is None or argument(second, two.stream.path) is not image:
        return False
    roles = {axis.path for axis in (two.stream, *two.aligned)}
    for path, leaf in leaves((second.args, second.kwargs)):
        if leaf is image and path not in roles:  # it reads all tokens; in a span there are K
            return False
    outputs = _outputs(first)
    readers = {user for node in outputs for user in node.users if user not in outputs}
    if readers != {second}:
        return False
    others = [node for node in second.all_input_nodes if node not in outputs]
    return not any(_depends(node, first) for node in others)


def _outputs(block: fx.Node) -> list[fx.Node]:
    """The block's node and the getitem nodes that take its output apart."""
    found = [block]
    for node in found:
        found += [user for user in node.users if user.target is operator.getitem]
    return found


def _depends(node: fx.Node, on: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is on:
            return True
        if current > on:  # what stands before it cannot depend on it
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            pending += fresh
    return False


def _fuse(
    program: Program, graph: fx.Graph, members: Sequence[BlockSpec]
) -> tuple[BlockSpec, nn.Module]:
    """Put one call in the place of the members' calls; returns what is known about it."""
    names = [spec.name for spec in members]
    last = block_node(graph, names[-1])
    body = _SpanBody()
    for spec in members:
        body.add(block_node(graph, spec.name), spec)
    tails = [node for node in _outputs(last) if _read_outside(node)]
    body.graph.output(tuple(body.copies[node] for node in tails))
    modules = {spec.name: program.module.get_submodule(spec.name) for spec in members}
    inner = {identifier(name): module for name, module in modules.items()}
    span = fx.GraphModule(inner, body.graph, class_name="BlockSpan")
    name = _span_name(names)
    with graph.inserting_before(last):
        call = graph.create_node(
            "call_module",
            name,
            tuple(body.inputs),
            name=identifier(name),
        )
        for position, node in enumerate(tails):
            part = graph.call_function(operator.getitem, (call, position))
            part.meta.update(node.meta)
            replace_uses(node, part, keep=lambda user: False)
    image = output_node(last, members[-1].output)
    for spec in reversed(members):
        for node in reversed(_outputs(block_node(graph, spec.name))):
            graph.erase_node(node)
    stream = TokenAxis((0, 0), 1, members[0].stream.start)
    return (
        BlockSpec(
            name=name,
            stream=stream,
            output=(tails.index(image),) if image in tails else (0,),
            aligned=tuple(axis for axis in body.axes if axis != stream),
            num_tokens=members[0].num_tokens,
            width=members[0].width,
            shares_index=any(spec.shares_index for spec in members),
            removable=all(spec.removable for spec in members),
            error=max(spec.error for spec in members),
            members=tuple(member for spec in members for member in spec.members),
        ),
        span,
    )


def _read_outside(node: fx.Node) -> bool:
    return any(user.target is not operator.getitem for user in node.users)


class _SpanBody:
    """The graph inside a span, built member by member.

    Attributes:
        inputs: nodes of the outer graph that the span reads; the stream is the first.
        axes: the token-aligned ones among them.
        copies: node of the outer graph -> node of the inner one.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.axes: list[TokenAxis] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self._known: dict[tuple[fx.Node, Any], fx.Node] = {}
        self._last_input: fx.Node | None = None

    def add(self, call: fx.Node, spec: BlockSpec) -> None:
        roles = {axis.path: axis for axis in (spec.stream, *spec.aligned)}
        if not self.inputs:  # whatever stands first in the first member's call
            self._input(argument(call, spec.stream.path), spec.stream)

        # By place and not by node: one tensor may be the stream here and a context there.
        def inner(path: Path, leaf: Any) -> Any:
            return self._input(leaf, roles.get(path)) if isinstance(leaf, fx.Node) else leaf

        args, kwargs = map_leaves((tuple(call.args), dict(call.kwargs)), inner)
        copy = self.graph.call_module(identifier(spec.name), tuple(args), dict(kwargs))
        self.copies[call] = copy
        for node in _outputs(call)[1:]:
            source, key = node.args[0], node.args[1]
            assert isinstance(source, fx.Node)
            self.copies[node] = self.graph.call_function(
                operator.getitem, (self.copies[source], key)
            )

    def _input(self, node: fx.Node, role: TokenAxis | None) -> fx.Node:
        if node in self.copies:  # made inside the span
            return self.copies[node]
        key = (node, role and (role.axis, role.start, role.batched))
        if key not in self._known:
            place: Path = (0, len(self.inputs))
            self.inputs.append(node)
            with self.graph.inserting_after(self._last_input):
                self._last_input = self.graph.placeholder(f"input_{len(self.inputs)}")
            if role is not None:
                self.axes.append(dataclasses.replace(role, path=place))
            self._known[key] = self._last_input
        return self._known[key]


def _span_name(names: Sequence[str]) -> str:
    """``blocks.2-5``; ``blocks.5-single_blocks.0`` where the span crosses two lists."""
    parents = {name.rpartition(".")[0] for name in names}
    last = names[-1].rpartition(".")[2] if len(parents) == 1 else identifier(names[-1])
    return f"{names[0]}-{last}"
