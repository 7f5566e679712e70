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
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.errors import UnsupportedModelError, VerificationError
from diffcr_compile.program import Program, Stage, router_name, tensor_args
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
    if program.stage == Stage.OPEN:
        check_open(program)
        check_scatters(program, shapes)


def infer_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor node at the example's sizes, found by running on fake tensors.

    Raises:
        VerificationError: a node cannot run on what its inputs produce.
        UnsupportedModelError: sizes in the graph depend on values.
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
        except DATA_DEPENDENT as error:
            raise UnsupportedModelError(
                f"{n.name} cannot run: {needs_values(error)}"
            ) from error
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
        if calls > most or (calls == 0 and program.stage < Stage.FROZEN):
            raise VerificationError(
                f"{spec.name} is called {calls} times in a {program.stage.name} graph"
            )


def check_scatters(program: Program, shapes: dict[str, tuple[int, ...]]) -> None:
    """A routed block returns a stream of the shape it was given, and as many rows as it was given.

    The rows are counted here because fake tensors let index_put take values of any length.
    """
    for node in program.graph.find_nodes(op="call_function", target=routing.scatter_tokens):
        stream, index, kept, processed = (_shape(shapes, arg) for arg in node.args[:4])
        if shapes[node.name] != stream:
            raise VerificationError(
                f"{node.name} has shape {shapes[node.name]}, its stream has {stream}"
            )
        rows = stream[1] - int(node.args[6]) + index[1] if index else stream[1]
        expected = (stream[0], rows, stream[2])
        kept_fits = node.args[2] is None or kept == expected
        if not (kept_fits and processed == expected):
            raise VerificationError(
                f"{node.name} puts back {processed} for kept tokens {kept}, expected {expected}"
            )


def _shape(shapes: dict[str, tuple[int, ...]], argument: Any) -> tuple[int, ...]:
    """Shape of a node's tensor; () for None, which an index is while all tokens are kept."""
    return shapes.get(argument.name, ()) if isinstance(argument, fx.Node) else ()


def check_static(program: Program) -> None:
    """Every K is an integer in the graph and the one that the schedule says."""
    if program.schedule is None or program.bucket is None:
        raise VerificationError("a FROZEN program needs its schedule and its bucket")
    column = program.schedule.column(program.bucket)
    wanted = {
        router_name(spec.name): column[spec.name]
        for spec in program.blocks
        if column[spec.name]
    }
    for node in program.graph.find_nodes(op="call_function", target=routing.select_tokens):
        logits, kept = node.args[:2]
        if not isinstance(kept, int):
            raise VerificationError(f"{node.name}: K is {kept!r}, expected an int")
        expected = wanted.get(str(logits.target)) if isinstance(logits, fx.Node) else None
        if kept != expected:
            raise VerificationError(
                f"{node.name}: K is {kept}, the schedule says {expected or 'no such block'}"
            )
    _check_no_selector(program)


def check_open(program: Program) -> None:
    """Every K is an integer or the length of the input of its own block, and each input is one."""
    blocks = {router_name(spec.name): spec.name for spec in program.blocks}
    read: dict[str, str] = {}
    for node in program.graph.find_nodes(op="call_function", target=routing.select_tokens):
        logits, kept = node.args[:2]
        if isinstance(kept, int):
            continue
        source = kept.args[0] if kept.target is routing.kept_length else None
        if not isinstance(source, fx.Node) or source.op != "placeholder":
            raise VerificationError(
                f"{node.name}: K is {kept}, expected the length of an input"
            )
        read[source.name] = blocks.get(str(logits.target), "")
    if read != dict(program.kept_inputs):
        raise VerificationError(
            f"the lengths of {read} are read as K of blocks, expected {dict(program.kept_inputs)}"
        )
    _check_no_selector(program)


def _check_no_selector(program: Program) -> None:
    left = [n for n, m in program.module.named_modules() if isinstance(m, TokenSelector)]
    if left:
        raise VerificationError(
            f"a {program.stage.name} graph still has selectors whose K may change: {left}"
        )
