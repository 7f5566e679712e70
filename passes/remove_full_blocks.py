"""Drop the routing of blocks that keep every token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from diffcr_compile import routing
from diffcr_compile.errors import PostconditionError, PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.passes.graph_edit import ROUTING_OPS, erase_unused
from diffcr_compile.program import Program, Stage, router_name


@dataclasses.dataclass(frozen=True)
class RemoveFullBlocks(Pass):
    """Leave nothing of the routing where it does nothing.

    Before:  ``index = select_tokens(router(x), N)``, gather, ``y = block(...)``, scatter
    After:   ``y = block(x, ...)``      K = N: no router, no gather, no scatter

    With the ``paper`` gate a full block keeps its router, because the gate changes its value.
    """

    name: ClassVar[str] = "remove-full-blocks"

    def requires(self, program: Program) -> None:
        if program.stage != Stage.FROZEN:
            raise PreconditionError(
                f"{self.name} needs a FROZEN program, got {program.stage.name}"
            )

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        num_tokens = {router_name(spec.name): spec.num_tokens for spec in program.blocks}
        edits = 0
        for index in list(graph.find_nodes(op="call_function", target=routing.select_tokens)):
            kept, present = index.args[1], num_tokens[_router(index)]
            if kept == present:
                _keep_all(index)
                edits += 1
        if edits == 0:
            return PassResult(program, 0)
        erase_unused(graph)
        return PassResult(program.with_graph(graph), edits)

    def ensures(self, program: Program) -> None:
        num_tokens = {router_name(spec.name): spec.num_tokens for spec in program.blocks}
        for node in program.graph.find_nodes(op="call_function", target=routing.select_tokens):
            if node.args[1] == num_tokens[_router(node)]:
                raise PostconditionError(
                    f"{self.name}: {node.name} still selects {node.args[1]} tokens"
                )


def _router(index: fx.Node) -> str:
    """Target of the router whose logits a select_tokens node reads."""
    logits = index.args[0]
    assert isinstance(logits, fx.Node)
    return str(logits.target)


def _keep_all(index: fx.Node) -> None:
    for user in list(index.users):
        if user.target is routing.gather_tokens:
            tensor = user.args[0]
            assert isinstance(tensor, fx.Node)
            user.replace_all_uses_with(tensor)
        elif user.target is routing.paper_gate:
            user.update_arg(1, None)
    scatter = next(u for u in index.users if u.target is routing.scatter_tokens)
    gate, processed = scatter.args[4], scatter.args[3]
    assert isinstance(processed, fx.Node)
    if gate is None:
        scatter.replace_all_uses_with(processed)
    else:
        scatter.update_arg(1, None)


def has_routing(program: Program) -> bool:
    """Whether any routing op is left in the graph."""
    return any(node.target in ROUTING_OPS for node in program.graph.nodes)
