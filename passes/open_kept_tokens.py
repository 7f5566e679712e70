"""Replace the integer K of some blocks by the length of an input."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import fx

from diffcr_compile import routing
from diffcr_compile.errors import PostconditionError, PreconditionError
from diffcr_compile.passes.base import Pass, PassResult
from diffcr_compile.program import Program, Stage, identifier, router_name
from diffcr_compile.signature import CallCodeGen, CallSignature

PREFIX = "kref_"


@dataclasses.dataclass(frozen=True)
class OpenKeptTokens(Pass):
    """Let one graph serve timestep buckets that differ in numbers of kept tokens only.

    Before:  ``index = select_tokens(router(x), 128)``
    After:   ``index = select_tokens(router(x), kept_length(kref_blocks_3))``     kref_blocks_3 (K,)

    The new inputs come last. Blocks that are not named keep their integers.

    Args:
        kept: block -> the K of the example, of every block whose K is to be open.
    """

    name: ClassVar[str] = "open-kept-tokens"
    kept: Mapping[str, int]

    def requires(self, program: Program) -> None:
        if program.stage != Stage.FROZEN:
            raise PreconditionError(
                f"{self.name} needs a FROZEN program, got {program.stage.name}"
            )
        selects = _selects(program)
        without = sorted(set(self.kept) - set(selects))
        if without:
            raise PreconditionError(
                f"{self.name}: {without} select no tokens in this graph, so there is no K to open; "
                "freeze them with 0 < K < N"
            )
        for block, kept in self.kept.items():
            present = program.block(block).num_tokens
            if not 0 < kept <= present:
                raise PreconditionError(
                    f"{self.name}: {block} has {present} tokens, {kept} were asked for"
                )
            if len(selects[block].args) > 3:
                raise PreconditionError(
                    f"{self.name}: K of {block} is said in pieces for a TopK of at most "
                    f"{selects[block].args[3]}; such a K cannot be open"
                )

    def run(self, program: Program) -> PassResult:
        if not self.kept:
            return PassResult(program, 0)
        graph = program.copy_graph()
        signature = _extended(program.signature, self.kept)
        graph.set_codegen(CallCodeGen(signature))
        inputs = _placeholders(graph, self.kept)
        for name, select in _selects_of(graph, program).items():
            if name in inputs:
                with graph.inserting_before(select):
                    kept = graph.call_function(routing.kept_length, (inputs[name],))
                select.update_arg(1, kept)
        example = {
            input_name(block): torch.zeros(kept, device=program.device)
            for block, kept in self.kept.items()
        }
        result = program.with_graph(
            graph,
            stage=Stage.OPEN,
            signature=signature,
            example={**program.example, **example},
            kept_inputs={input_name(block): block for block in self.kept},
            schedule=None,
            bucket=None,
        )
        return PassResult(result, len(self.kept))

    def ensures(self, program: Program) -> None:
        for block, select in _selects(program).items():
            if (block in self.kept) == isinstance(select.args[1], int):
                raise PostconditionError(f"{self.name}: K of {block} is {select.args[1]!r}")


def input_name(block: str) -> str:
    """The input whose length is the number of tokens that a block keeps."""
    return f"{PREFIX}{identifier(block)}"


def _extended(signature: CallSignature, blocks: Mapping[str, int]) -> CallSignature:
    names = [input_name(block) for block in blocks]
    taken = sorted(set(names) & {p.name for p in signature.parameters})
    if taken or len(set(names)) < len(names):
        raise PreconditionError(f"the model has arguments of its own called {taken or names}")
    new = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    stars = [p for p in signature.parameters if p.kind is p.VAR_KEYWORD]
    others = [p for p in signature.parameters if p.kind is not p.VAR_KEYWORD]
    return dataclasses.replace(
        signature,
        parameters=(*others, *new, *stars),
        inputs={**signature.inputs, **{name: (name,) for name in names}},
    )


def _placeholders(graph: fx.Graph, blocks: Mapping[str, int]) -> dict[str, fx.Node]:
    """Block -> its new input, all after the inputs that are there."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    found = {}
    for block in blocks:
        with graph.inserting_after(last):
            last = graph.placeholder(input_name(block))
        found[block] = last
    return found


def _selects(program: Program) -> dict[str, fx.Node]:
    return _selects_of(program.graph, program)


def _selects_of(graph: fx.Graph, program: Program) -> dict[str, fx.Node]:
    """Block -> the node that selects its tokens."""
    blocks = {router_name(spec.name): spec.name for spec in program.blocks}
    found = {}
    for node in graph.find_nodes(op="call_function", target=routing.select_tokens):
        logits = node.args[0]
        assert isinstance(logits, fx.Node)
        found[blocks[str(logits.target)]] = node
    return found
