"""Rules a program must obey at each stage, checked after every pass.

``Graph.lint()`` and ``ExportedProgram.validate()`` both accept stale shapes, so the shapes are
inferred anew each time: the whole graph runs on fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from diffcr_compile import routing
from diffcr_compile.errors import VerificationError
from diffcr_compile.program import Program, Stage, tensor_args
from diffcr_compile.routing import TokenSelector


def verify(program: Program) -> None:
    """Raise VerificationError unless `program` obeys the rules of its stage."""
    program.graph.lint()
    shapes = infer_shapes(program)
    check_blocks(program)
    if program.stage == Stage.ROUTED:
        check_scatters(program, shapes)
    if program.stage == Stage.FROZEN:
        check_static(program)
        check_scatters(program, shapes)


def infer_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor node at the example's sizes, found by running on fake tensors.

    Raises:
        VerificationError: a node cannot run on what its inputs produce.
    """
    interpreter = _ShapeRecorder(program.module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        inputs = [mode.from_tensor(t) for t in tensor_args(program, program.example)]
        interpreter.run(*inputs)
    return interpreter.shapes


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise VerificationError(
                f"{n.name} cannot run: {type(error).__name__}: {error}. A pass gave it an input of "
                f"another shape or type. Node: {n.format_node()}"
            ) from error
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(int(size) for size in result.shape)
        return result


def check_blocks(program: Program) -> None:
    """Every routable block is called at most once, and exactly once before freezing."""
    for spec in program.blocks:
        calls = len(program.graph.find_nodes(op="call_module", target=spec.name))
        # BlendTwoBins calls each block at two bins while ratios are learned.
        most = 2 if program.stage == Stage.ROUTED else 1
        if calls > most or (calls == 0 and program.stage != Stage.FROZEN):
            raise VerificationError(f"{spec.name} is called {calls} times in a {program.stage.name} graph")


def check_scatters(program: Program, shapes: dict[str, tuple[int, ...]]) -> None:
    """A routed block returns a stream of the shape it was given."""
    for node in program.graph.find_nodes(op="call_function", target=routing.scatter_tokens):
        stream = node.args[0]
        if isinstance(stream, fx.Node) and shapes[node.name] != shapes[stream.name]:
            raise VerificationError(
                f"{node.name} has shape {shapes[node.name]}, its stream has {shapes[stream.name]}"
            )


def check_static(program: Program) -> None:
    """Every K is an integer in the graph and the one that the schedule says."""
    if program.schedule is None or program.bucket is None:
        raise VerificationError("a FROZEN program needs its schedule and its bucket")
    for node in program.graph.find_nodes(op="call_function", target=routing.select_tokens):
        if not isinstance(node.args[1], int):
            raise VerificationError(f"{node.name}: K is {node.args[1]!r}, expected an int")
    left = [n for n, m in program.module.named_modules() if isinstance(m, TokenSelector)]
    if left:
        raise VerificationError(f"a FROZEN graph still has selectors whose K may change: {left}")
