"""Put a router, gathers and a scatter around every routable block."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.errors import PostconditionError, PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.passes.graph_edit import (
    argument,
    block_node,
    gather_arguments,
    gather_bypassed,
    output_node,
    replace_uses,
    set_arguments,
)
from diffcr_compile.program import Program, Stage, identifier, selector_name, shortcut_name
from diffcr_compile.routing import Gate, RandomRouter, TokenRouter, TokenSelector
from diffcr_compile.shortcut import LinearShortcut


@dataclasses.dataclass(frozen=True)
class InsertTokenRouters(Pass):
    """Route every routable block; all tokens are kept until something else is asked for.

    Before:  ``y = block(x, rope, ...)``
    After:   ``index, gate = selector(x)``
             ``y = block(gather(x, index), gather(rope, index), ...)``
             ``out = scatter(x, index, y, gate)``

    A part whose output the model adds to the stream is scattered into zeros instead of ``x``. With a shortcut it is
    ``shortcut(x)`` in either case: what a token gets that bypasses the block, and what the gate weighs the block against.

    Args:
        gate: how the router's score enters the forward value, see ``routing.py``.
        router: ``linear`` to learn which tokens matter, ``random`` for the control.
        seed: seed of the routers' initial weights.
        shortcut_rank: rank of the linear map that bypassed tokens take; 0 for none, they stay what they are.
    """

    name: ClassVar[str] = "insert-token-routers"
    gate: Gate = "straight_through"
    router: Literal["linear", "random"] = "linear"
    seed: int = 0
    shortcut_rank: int = 0

    def requires(self, program: Program) -> None:
        if program.stage != Stage.CAPTURED:
            raise PreconditionError(
                f"{self.name} needs a CAPTURED program, got {program.stage.name}"
            )

    def run(self, program: Program) -> PassResult:
        if not program.blocks:
            return PassResult(program, 0)
        graph = program.copy_graph()
        added: dict[str, nn.Module] = {}
        routed = []
        for number, spec in enumerate(program.blocks):
            block = block_node(graph, spec.name)
            image = output_node(block, spec.output)
            if image is None:  # nobody reads its image stream, so there is nothing to put back
                continue
            added[selector_name(spec.name)] = self._selector(spec, number, program.device)
            if self.shortcut_rank:
                added[shortcut_name(spec.name)] = self._shortcut(spec, program.device)
            _route(graph, block, image, spec, has_shortcut=self.shortcut_rank > 0)
            routed.append(spec)
        result = program.with_graph(
            graph, added, stage=Stage.ROUTED, blocks=tuple(routed), gate=self.gate
        )
        return PassResult(result, len(routed))

    def ensures(self, program: Program) -> None:
        missing = [b.name for b in program.blocks if b.name not in program.module.routers]
        if missing:
            raise PostconditionError(f"{self.name}: no router was inserted for {missing}")

    def _selector(self, spec: BlockSpec, number: int, device: torch.device) -> TokenSelector:
        router: nn.Module = (
            RandomRouter() if self.router == "random" else TokenRouter(spec.width)
        )
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        for parameter in router.parameters():
            std = spec.width**-0.5
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
        return TokenSelector(
            router.to(device),
            spec.num_tokens,
            spec.stream.start,
            shares_index=spec.shares_index,
            gate=self.gate,
        )

    def _shortcut(self, spec: BlockSpec, device: torch.device) -> LinearShortcut:
        return LinearShortcut(
            spec.width,
            self.shortcut_rank,
            spec.stream.start,
            spec.num_tokens,
            adds=spec.bypass == "stream",
        ).to(device)


def _route(
    graph: fx.Graph, block: fx.Node, image: fx.Node, spec: BlockSpec, *, has_shortcut: bool
) -> None:
    with graph.inserting_before(block):
        stream = argument(block, spec.stream.path)
        name = block.name
        selection = graph.create_node(
            "call_module", selector_name(spec.name), (stream,), name=f"{name}_select"
        )
        index = graph.create_node(
            "call_function", operator.getitem, (selection, 0), name=f"{name}_selected"
        )
        gate = graph.create_node(
            "call_function", operator.getitem, (selection, 1), name=f"{name}_gate"
        )
        kept = gather_arguments(graph, block, spec, index)
    set_arguments(block, kept)
    with graph.inserting_before(block):
        base, base_kept = _bypass(
            graph, stream, kept[spec.stream.path], index, spec, has_shortcut
        )
    with graph.inserting_after(image):
        scatter = graph.create_node(
            "call_function",
            routing.scatter_tokens,
            (
                base,
                index,
                base_kept,
                image,
                gate,
                spec.stream.start,
                spec.num_tokens,
            ),
            name=f"{name}_scatter",
        )
    replace_uses(image, scatter, keep=lambda user: user is scatter)


def _bypass(
    graph: fx.Graph,
    stream: fx.Node,
    kept: fx.Node,
    index: fx.Node,
    spec: BlockSpec,
    has_shortcut: bool,
) -> tuple[fx.Node, fx.Node | None]:
    """What the stream is where a token bypasses the block, and the rows of it that are kept; None for zeros."""
    name = identifier(spec.name)
    if has_shortcut:
        base = graph.create_node(
            "call_module", shortcut_name(spec.name), (stream,), name=f"{name}_bypassed"
        )
        return base, gather_bypassed(graph, base, index, spec)
    if spec.bypass == "stream":
        return stream, kept
    nothing = graph.create_node(
        "call_function", routing.nothing_added, (stream,), name=f"{name}_nothing"
    )
    return nothing, None
