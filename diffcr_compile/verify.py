"""Rules a program must obey at each stage, checked after every pass.

``Graph.lint()`` and ``ExportedProgram.validate()`` both accept stale shapes, so the shapes are
inferred anew each time: the whole graph runs on fake tensors. Of several passes in a row the later ones
run those blocks only that are given other shapes than before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from diffcr_compile import routing
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.errors import UnsupportedModelError, VerificationError
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import Program, Stage, router_name, tensor_args
from diffcr_compile.routing import TokenSelector

# A module and the forms of what it was given -> the forms of what it returned.
KnownCalls = dict[Any, Any]
# What may be in a call that is known; anything else may hold tensors that nobody sees.
_PLAIN = (Tensor, int, float, str, type(None), torch.dtype, torch.device)


def verify(program: Program, known: KnownCalls | None = None) -> None:
    """Raise VerificationError unless `program` obeys the rules of its stage.

    Args:
        program: to look at.
        known: calls of modules that need not run again; those that do are added.
    """
    program.graph.lint()
    shapes = infer_shapes(program, known)
    check_blocks(program)
    if program.stage == Stage.ROUTED:
        check_scatters(program, shapes)
    if program.stage == Stage.FROZEN:
        check_static(program)
        check_scatters(program, shapes)
    if program.stage == Stage.OPEN:
        check_open(program)
        check_scatters(program, shapes)


def infer_shapes(
    program: Program, known: KnownCalls | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor node at the example's sizes, found by running on fake tensors.

    Args:
        program: to run.
        known: see :func:`verify`.

    Raises:
        VerificationError: a node cannot run on what its inputs produce.
        UnsupportedModelError: sizes in the graph depend on values.
    """
    interpreter = _ShapeRecorder(program.module, {} if known is None else known)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with kept_caches(program.module):
        _run(interpreter, program, mode)
    return interpreter.shapes


def _run(interpreter: _ShapeRecorder, program: Program, mode: FakeTensorMode) -> None:
    with mode, torch.no_grad():
        inputs = [mode.from_tensor(t) for t in tensor_args(program, program.example)]
        interpreter.run(*inputs)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, known: KnownCalls) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._known = known
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

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        given, spec = pytree.tree_flatten((args, kwargs))
        if not all(isinstance(leaf, _PLAIN) for leaf in given):
            return super().call_module(target, args, kwargs)
        key = (self.fetch_attr(target), str(spec), *((type(g), _form(g)) for g in given))
        if key in self._known:
            return pytree.tree_map_only(_Form, _Form.tensor, self._known[key])
        result = super().call_module(target, args, kwargs)
        if all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(result)):
            self._known[key] = pytree.tree_map(_form, result)
        return result


@dataclasses.dataclass(frozen=True)
class _Form:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        return torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device
        )


def _form(leaf: Any) -> Any:
    """What the form of a result depends on: the form of a tensor, else the value."""
    if not isinstance(leaf, Tensor):
        return leaf
    return _Form(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)


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
