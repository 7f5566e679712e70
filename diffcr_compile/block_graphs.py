"""A routed block as a program of its own, frozen at any number of kept tokens.

Cut out of the ROUTED program, so that what is measured is what will be exported: router, top-k, gathers,
block and scatter, made by the same passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.errors import PreconditionError, UnsupportedModelError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.graph_edit import block_node
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.program import (
    DiTGraph,
    Program,
    Stage,
    selector_name,
    shortcut_name,
    tensor_args,
)
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from diffcr_compile.signature import CallCodeGen, CallSignature


@dataclasses.dataclass(frozen=True)
class BlockGroup:
    """Blocks of equal structure: what one costs, all cost.

    Attributes:
        blocks: their names.
        levels: allowed kept tokens, ascending; the last is all of them.
        program: the first of them, ROUTED, alone.
    """

    blocks: tuple[str, ...]
    levels: tuple[int, ...]
    program: Program

    def at(self, kept_tokens: int) -> Program:
        """The block FROZEN at one number of kept tokens."""
        return frozen_at(self.program, {self.program.blocks[0].name: kept_tokens})


def frozen_at(routed: Program, kept_tokens: Mapping[str, int]) -> Program:
    """A ROUTED program FROZEN with one timestep bucket."""
    schedule = TokenSchedule(
        {block: (kept,) for block, kept in kept_tokens.items()},
        {spec.name: spec.num_tokens for spec in routed.blocks},
        TimestepBuckets.even(1),
    )
    return run_passes(routed, [FreezeKeptTokens(schedule, 0), RemoveFullBlocks()])


def block_groups(
    routed: Program, levels: Mapping[str, Sequence[int]]
) -> tuple[BlockGroup, ...]:
    """The routed blocks, those of equal structure and levels together, in running order."""
    groups: dict[tuple[str, tuple[int, ...]], list[Program]] = {}
    if routed.stage != Stage.ROUTED:
        raise PreconditionError(f"expected a ROUTED program, got {routed.stage.name}")
    values = _inputs_of_blocks(routed)
    for spec in routed.blocks:
        program = block_program(routed, spec, values)
        groups.setdefault((structure(program), tuple(levels[spec.name])), []).append(program)
    return tuple(
        BlockGroup(tuple(p.blocks[0].name for p in programs), kept, programs[0])
        for (_, kept), programs in groups.items()
    )


def fingerprint_of(routed: Program, groups: Sequence[BlockGroup]) -> str:
    """What latencies depend on, and nothing else: structures and sizes, no weights, no levels."""
    blocks = sorted(
        (name, structure(group.program)) for group in groups for name in group.blocks
    )
    inputs = [(n, str(t.dtype), tuple(t.shape)) for n, t in routed.example.items()]
    return hashlib.sha256(
        repr((blocks, inputs, _parameters(routed.module))).encode()
    ).hexdigest()


def structure(program: Program) -> str:
    """Equal for two blocks alone that run the same layers on the same shapes."""
    (spec,) = program.blocks
    own = (spec.name, selector_name(spec.name), shortcut_name(spec.name))
    prefixes = tuple(f"{name}." for name in own)
    parameters = [
        (next((n.removeprefix(p) for p in prefixes if n.startswith(p)), n), kind, shape)
        for n, kind, shape in _parameters(program.module)
    ]
    inputs = [(str(t.dtype), tuple(t.shape)) for t in program.example.values()]
    facts = dataclasses.replace(spec, name="", members=("",) * len(spec.members), error=0.0)
    block = type(program.module.get_submodule(spec.name)).__qualname__
    return repr((block, facts, sorted(parameters), inputs, program.gate))


def _parameters(module: fx.GraphModule) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(n, str(p.dtype), tuple(p.shape)) for n, p in module.named_parameters()]


def _inputs_of_blocks(program: Program) -> dict[fx.Node, Any]:
    """What the routed blocks are given on the example inputs."""
    wanted = {n for spec in program.blocks for n in _outer(_unit(program.graph, spec))}
    recorder = _Recorder(program.module, wanted)
    with torch.no_grad():
        recorder.run(*tensor_args(program, program.example))
    return recorder.values


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def block_program(routed: Program, spec: BlockSpec, values: Mapping[fx.Node, Any]) -> Program:
    """One block of a ROUTED program alone, with router, gathers and scatter.

    Args:
        routed: all tokens kept.
        spec: the block.
        values: what the nodes are that the block reads.

    Raises:
        UnsupportedModelError: the block reads something that is no tensor.
    """
    inside = _unit(routed.graph, spec)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    example: dict[str, Tensor] = {}
    for number, node in enumerate(_outer(inside)):
        value = values[node]
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{spec.name} cannot be measured alone: it reads {node.name}, a "
                f"{type(value).__name__}; only tensors can be inputs of a graph"
            )
        copies[node] = graph.placeholder(f"input_{number}")
        example[f"input_{number}"] = value
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    outputs = [n for n in inside if any(user not in inside for user in n.users)]
    graph.output(tuple(copies[node] for node in outputs))
    return _program(routed, spec, graph, example, len(outputs))


def _program(
    routed: Program, spec: BlockSpec, graph: fx.Graph, example: dict[str, Tensor], outputs: int
) -> Program:
    _, out_spec = pytree.tree_flatten((0,) * outputs)
    signature = CallSignature(
        _keywords(example), {name: (name,) for name in example}, (), out_spec
    )
    graph.set_codegen(CallCodeGen(signature))
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    root = {target: routed.module.get_submodule(target) for target in sorted(targets)}
    module = DiTGraph(root, graph, class_name="DiTGraph").train(routed.module.training)
    return dataclasses.replace(
        routed,
        module=module,
        signature=signature,
        example=example,
        blocks=(spec,),
        refused=(),
        sample_input=None,
        timestep_input=None,
        origin=None,
    ).attached()


def _keywords(names: Mapping[str, Any]) -> Any:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(inspect.Parameter(name, kind) for name in names)


def _unit(graph: fx.Graph, spec: BlockSpec) -> list[fx.Node]:
    """The nodes that routing put around a block, and the block, in graph order."""
    block = block_node(graph, spec.name)
    selection = next(iter(graph.find_nodes(op="call_module", target=selector_name(spec.name))))
    unit = {selection, block}
    for node in graph.nodes:  # in running order, so one sweep is enough
        fields = node.target is operator.getitem and node.args[0] in unit
        gathers = node.target is routing.gather_tokens and node.args[1] in unit
        scatters = node.target is routing.scatter_tokens and node.args[1] in unit
        if fields or gathers or scatters:
            unit.add(node)
        if scatters and isinstance(node.args[0], fx.Node):
            base = node.args[0]
            made_here = (routing.nothing_added, shortcut_name(spec.name))
            unit |= {base} if base.target in made_here else set()
    return [node for node in graph.nodes if node in unit]


def _outer(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """What the nodes of a unit read from outside of it, in order."""
    read = dict.fromkeys(n for node in inside for n in node.all_input_nodes)
    return [node for node in read if node not in inside]
