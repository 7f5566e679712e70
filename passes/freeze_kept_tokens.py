"""Replace each block's selector by a router and a top-k with the integer of the token schedule."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch import fx, nn

from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.errors import PostconditionError, PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.passes.graph_edit import erase_unused
from diffcr_compile.program import Program, Stage, identifier, router_name, selector_name
from diffcr_compile.routing import Gate
from diffcr_compile.schedule import TokenSchedule


@dataclasses.dataclass(frozen=True)
class FreezeKeptTokens(Pass):
    """Make every K in the graph an integer.

    Before:  ``index, gate = selector(x)``               K is an attribute of the selector
    After:   ``index = select_tokens(router(x), 128)``   K is an int in the graph
             ``out = x``                                 K = 0: the block is gone, since many
                                                         blocks cannot run on no tokens at all

    Args:
        schedule: kept tokens per block and timestep bucket; must name every routed block.
        bucket: which column of the schedule.
        max_topk: largest K of a TopK where the graph will run; a larger one is said in pieces, with
            the same set of tokens (``select_tokens(router(x), 4000, False, 3840)``). None: no limit.
    """

    name: ClassVar[str] = "freeze-kept-tokens"
    schedule: TokenSchedule
    bucket: int
    max_topk: int | None = None

    def requires(self, program: Program) -> None:
        if program.stage != Stage.ROUTED:
            raise PreconditionError(
                f"{self.name} needs a ROUTED program, got {program.stage.name}; "
                "run insert-token-routers first"
            )
        if self.max_topk is not None and self.max_topk < 1:
            raise PreconditionError(
                f"{self.name}: max_topk must be at least 1, got {self.max_topk}"
            )
        if not 0 <= self.bucket < len(self.schedule.buckets):
            raise PreconditionError(
                f"{self.name}: bucket must be in [0, {len(self.schedule.buckets)}), got {self.bucket}"
            )
        column = self.schedule.column(self.bucket)
        missing = sorted({b.name for b in program.blocks} - set(column))
        if missing:
            raise PreconditionError(f"{self.name}: schedule has no entry for {missing}")
        unknown = sorted(set(column) - {b.name for b in program.blocks})
        if unknown:
            raise PreconditionError(
                f"{self.name}: schedule names {unknown}, which are not routed"
            )
        for spec in program.blocks:
            kept = column[spec.name]
            if not 0 <= kept <= spec.num_tokens:
                raise PreconditionError(
                    f"{self.name}: {spec.name} has {spec.num_tokens} tokens, the schedule keeps {kept}"
                )
            if kept == 0 and not spec.removable:
                raise PreconditionError(
                    f"{self.name}: {spec.name} cannot be skipped (keep ratio 0), it also returns "
                    "another stream; keep at least one token"
                )

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        column = self.schedule.column(self.bucket)
        routers: dict[str, nn.Module] = {}
        for spec in program.blocks:
            target = selector_name(spec.name)
            selection = next(iter(graph.find_nodes(op="call_module", target=target)))
            if column[spec.name] == 0:
                _skip_block(selection)
                continue
            routers[router_name(spec.name)] = program.module.get_submodule(f"{target}.router")
            kept = column[spec.name]
            limit = self.max_topk if self.max_topk and kept > self.max_topk else None
            _freeze(graph, selection, spec, kept, limit, program.gate)
        erase_unused(graph)
        frozen = program.with_graph(
            graph,
            routers,
            stage=Stage.FROZEN,
            schedule=self.schedule,
            bucket=self.bucket,
            routed=program,
        )
        return PassResult(frozen, len(program.blocks))

    def ensures(self, program: Program) -> None:
        want = [kept for kept in self.schedule.column(self.bucket).values() if kept]
        nodes = program.graph.find_nodes(op="call_function", target=routing.select_tokens)
        got = [node.args[1] for node in nodes]
        if sorted(map(int, got)) != sorted(want):
            raise PostconditionError(
                f"{self.name}: the graph keeps {got}, the schedule says {want}"
            )


def _skip_block(selection: fx.Node) -> None:
    users = [user for field in selection.users for user in field.users]
    scatter = next(user for user in users if user.target is routing.scatter_tokens)
    stream = scatter.args[0]
    assert isinstance(stream, fx.Node)
    scatter.replace_all_uses_with(stream)


def _freeze(
    graph: fx.Graph,
    selection: fx.Node,
    spec: BlockSpec,
    kept: int,
    max_topk: int | None,
    gate: Gate,
) -> None:
    name = identifier(spec.name)
    stream = selection.args[0]
    with graph.inserting_before(selection):
        image = graph.call_function(
            routing.image_tokens, (stream, spec.stream.start, spec.num_tokens)
        )
        logits = graph.create_node(
            "call_module", router_name(spec.name), (image,), name=f"{name}_logits"
        )
        index = graph.create_node(
            "call_function",
            routing.select_tokens,
            (logits, kept, spec.shares_index, *([max_topk] if max_topk else [])),
            name=f"{name}_index",
        )
        paper = (
            graph.call_function(routing.paper_gate, (logits, index))
            if gate == "paper"
            else None
        )
    for user in list(selection.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(index)
        elif user.target is operator.getitem and user.args[1] == 1:
            for scatter in list(user.users):
                scatter.args = tuple(paper if a is user else a for a in scatter.args)
