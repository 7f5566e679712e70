"""nn.Module -> CAPTURED program: one ``call_module`` node per routable block, the rest plain ATen.

``torch.export`` gives one flat graph, out of which the blocks' bodies are cut (``block_calls.py``):

* modules that are not blocks stay inlined, so an outer call into a submodule of a block (the DiT of
  diffusers calls ``transformer_blocks.0.norm1.emb`` again after its blocks) is just nodes;
* parameters and buffers are the user's own, by qualified name, so nothing is copied and training
  the graph trains what the user sees;
* what depends on constants only is computed once (``fold.py``).

Where ``torch.export`` fails, the model is run once on real tensors and recorded (``trace.py``). Either way the graph is compared with the model before it is used, on the example and on
inputs that the capture has not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from diffcr_compile.block_calls import Input, graph_with_block_calls
from diffcr_compile.blocks import BlockSpec, Path, Refusal, map_leaves
from diffcr_compile.errors import CaptureError, one_line
from diffcr_compile.fold import fold_constants
from diffcr_compile.program import DiTGraph, Program, Stage, batch_size
from diffcr_compile.signature import CallCodeGen, CallSignature, bind_call, split_leaves
from diffcr_compile.trace import trace_graph

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
# Captured graphs are equal to their model bit for bit, nearly always; a few fold a constant in another
# order (1e-7). A number that was baked in moves the output by 1e-2 and more.
MAX_CAPTURE_ERROR = 1e-4
# What models call the input that says how noisy the sample is.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    blocks: Sequence[BlockSpec],
    refused: Sequence[Refusal] = (),
    sample: Path = (),
) -> Program:
    """Capture `model` with its routable blocks as single nodes.

    Args:
        model: the user's model, in evaluation mode; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs. Token counts and image sizes are fixed by them, the batch
            size is not where the model allows it.
        blocks: blocks to keep as nodes, from ``legality.find_blocks``.
        refused: passed on into the program.
        sample: path of the noisy sample in (args, kwargs), from ``legality.find_blocks``.

    Raises:
        CaptureError: neither torch.export nor recording gives a graph that computes what the model does.
    """
    call = _Call(model, args, kwargs)
    names = [spec.name for spec in blocks]
    failures = []
    for what, way in _WAYS.items():
        try:
            found = way(model, call, names)
            program = _program(found, call, blocks, refused, sample)
            check_capture(program, model, call.bound)
        except CaptureError as error:
            failures.append(f"{what}: {error}")
            continue
        return program
    raise CaptureError(
        f"{type(model).__name__} cannot be captured.\n" + "\n".join(failures) + "\n"
        "Typical causes are branches on tensor values and numbers read from tensors with .item() or "
        ".numpy() in forward; move them out of forward or make them depend on shapes only."
    )


class _Call:
    """A call of the model, taken apart.

    Attributes:
        parameters: of the model's forward.
        bound: the given arguments by parameter name.
        paths: placeholder name -> path into `bound`, tensors only.
        constants: (path, value) of everything else.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.parameters, self.bound = bind_call(model, args, kwargs)
        tensors, constants = split_leaves(self.bound)
        self.paths = {_placeholder(path): path for path in tensors}
        self.constants = tuple(constants) + _default_constants(self.parameters, self.bound)
        self.example = {name: _leaf(self.bound, path) for name, path in self.paths.items()}


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A graph, what its nodes refer to, and how it came about."""

    graph: fx.Graph
    root: Mapping[str, Any]
    out_spec: pytree.TreeSpec
    dynamic_batch: bool
    history: tuple[str, ...] = ()


def _exported(
    model: nn.Module, call: _Call, names: Sequence[str], *, free_batch: bool
) -> _Captured:
    """By torch.export."""
    expanded = _expand_variadic(model, call.bound)
    batch = batch_size(call.example) if free_batch else None
    exported = _export(model, expanded, names, batch)
    every = pytree.tree_leaves(expanded)
    placeholders = iter(call.paths)
    inputs = [
        Input(next(placeholders)) if isinstance(leaf, Tensor) else leaf for leaf in every
    ]
    try:
        graph, root = graph_with_block_calls(exported, model, names, inputs)
    except CaptureError:
        raise
    except Exception as error:  # the exporter's account of a block's outputs may be wrong
        raise CaptureError(f"the blocks cannot be cut out: {_first_lines(error)}") from error
    return _Captured(graph, root, exported.call_spec.out_spec, free_batch)


def _recorded(model: nn.Module, call: _Call, names: Sequence[str]) -> _Captured:
    """By running the model."""
    for path, value in call.constants:
        if not isinstance(
            value, _PLAIN
        ):  # tensors inside it would become constants of the graph
            raise CaptureError(
                f"{'.'.join(map(str, path))} is a {type(value).__name__}; a graph takes tensors, "
                "numbers, strings, and tuples, lists and dicts of them"
            )
    expanded = _expand_variadic(model, call.bound)
    variadic = {p.name for p in call.parameters if p.kind is p.VAR_KEYWORD}
    paths = {
        name: path[1:] if path[0] in variadic else path for name, path in call.paths.items()
    }
    try:
        graph, root, out_spec = trace_graph(model, expanded, paths, names)
    except Exception as error:
        raise CaptureError(_first_lines(error)) from error
    line = "capture: recorded on real tensors, because torch.export cannot trace the model"
    return _Captured(graph, root, out_spec, dynamic_batch=False, history=(line,))


_Way = Callable[[nn.Module, _Call, Sequence[str]], _Captured]
_WAYS: dict[str, _Way] = {
    "With torch.export and a free batch": functools.partial(_exported, free_batch=True),
    "With torch.export and a fixed batch": functools.partial(_exported, free_batch=False),
    "Recorded on real tensors": _recorded,
}


def _program(
    found: _Captured,
    call: _Call,
    blocks: Sequence[BlockSpec],
    refused: Sequence[Refusal],
    sample: Path,
) -> Program:
    signature = CallSignature(call.parameters, call.paths, call.constants, found.out_spec)
    root = dict(found.root)
    fold_constants(found.graph, root)
    found.graph.set_codegen(CallCodeGen(signature))
    module = DiTGraph(root, found.graph, class_name="DiTGraph").eval()
    return Program(
        module=module,
        stage=Stage.CAPTURED,
        signature=signature,
        example=call.example,
        blocks=tuple(blocks),
        refused=tuple(refused),
        sample_input=_sample_name(sample, list(call.bound)),
        timestep_input=next((n for n in call.example if n in TIMESTEP_NAMES), None),
        dynamic_batch=found.dynamic_batch,
        history=found.history,
    ).attached()


@torch.no_grad()
def check_capture(program: Program, model: nn.Module, bound: Mapping[str, Any]) -> None:
    """Compare the graph with the model, on the example and on inputs that the capture has not seen.

    A number that was baked into the graph shows on the unseen ones. They are legal for any model:
    the example's samples in another order, other noise, other timesteps.

    Raises:
        CaptureError: the outputs differ by more than rounding.
    """
    if any(t.is_meta or isinstance(t, FakeTensor) for t in program.example.values()):
        return  # nothing to compare: a dry run
    trials = {"the example": dict(bound), "unseen inputs": _unseen(program, bound)}
    if program.dynamic_batch:  # a model may fix it without a word, and the exporter too
        trials["one more sample"] = _one_more(program, bound)
    for what, inputs in trials.items():
        try:
            expected = _tensors(_call_model(model, program, inputs))
        except Exception as error:
            raise CaptureError(
                f"the model itself does not run on {what}: {_first_lines(error)}"
            ) from error
        try:
            found = _tensors(_call_model(program.module, program, inputs))
        except Exception as error:
            raise CaptureError(
                f"on {what} the captured graph does not run: {_first_lines(error)}"
            ) from error
        for one, two in zip(found, expected, strict=True):
            if one.shape != two.shape:
                raise CaptureError(
                    f"on {what} the graph returns {tuple(one.shape)}, the model {tuple(two.shape)}"
                )
            away = _relative_error(one, two)
            if not away <= MAX_CAPTURE_ERROR:
                raise CaptureError(
                    f"on {what} the captured graph differs from the model by {away:.1e} (relative; "
                    f"allowed {MAX_CAPTURE_ERROR:.0e}): a number that forward reads from its inputs "
                    "was baked into the graph"
                )


def _call_model(model: nn.Module, program: Program, bound: Mapping[str, Any]) -> Any:
    call = dict(bound)
    args: list[Any] = []
    for parameter in program.signature.parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in call:
            args.append(call.pop(parameter.name))
        elif parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(parameter.name, {}))
    return model(*args, **call)


def _unseen(program: Program, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its samples rolled by one, other noise and other timesteps."""
    generator = torch.Generator().manual_seed(7)
    names = {path: name for name, path in program.signature.inputs.items()}
    batch = program.batch

    def change(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = names[path]
        if leaf.ndim > 0 and leaf.shape[0] == batch:
            leaf = leaf.roll(1, 0)
        if name == program.sample_input and leaf.is_floating_point():
            return leaf + torch.randn(leaf.shape, generator=generator).to(leaf)
        if name == program.timestep_input:
            return leaf // 2 if not leaf.is_floating_point() else leaf * 0.5
        return leaf

    changed: dict[str, Any] = map_leaves(dict(bound), change)
    return changed


def _one_more(program: Program, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its first sample once more at the end."""
    batch = program.batch

    def longer(_: Path, leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return torch.cat([leaf, leaf[:1]]) if is_batched else leaf

    changed: dict[str, Any] = map_leaves(dict(bound), longer)
    return changed


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0
    if not found.is_floating_point():
        return float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((found - expected).abs().max() / scale).item())


def _sample_name(sample: Path, parameters: Sequence[str]) -> str | None:
    """Placeholder of the sample: positional arguments are known by their parameter's name."""
    if not sample:
        return None
    first = parameters[int(sample[1])] if sample[0] == 0 else sample[1]
    return _placeholder((first, *sample[2:]))


def _export(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], free_batch: int | None
) -> ExportedProgram:
    """torch.export; with `free_batch`, axes of that size in front of tensors may change later."""
    shapes = None
    if free_batch is not None:
        # torch.export specialises sizes 0 and 1, so one sample is captured as two equal ones.
        call = _at_least_two(call, free_batch)
        size = max(free_batch, 2)
        shapes = pytree.tree_map(lambda leaf: _batch_axis(leaf, size), call)
    try:
        return _quiet_export(model, call, names, shapes)
    except Exception as error:  # torch.export raises dozens of types
        raise CaptureError(_first_lines(error)) from error


def _quiet_export(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], shapes: Any
) -> ExportedProgram:
    # The exporter marks the tensors it was given, prints, and puts autograd switches into the graph.
    call = map_leaves(
        dict(call), lambda _, t: t.detach().clone() if isinstance(t, Tensor) else t
    )
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        return torch.export.export(
            model,
            (),
            dict(call),
            strict=False,
            preserve_module_call_signature=tuple(names),
            dynamic_shapes=shapes,
        )


def _expand_variadic(model: nn.Module, bound: Mapping[str, Any]) -> dict[str, Any]:
    """Bound arguments as plain keyword arguments; ``**kwargs`` are merged in."""
    kinds = {n: p.kind for n, p in inspect.signature(model.forward).parameters.items()}
    call: dict[str, Any] = {}
    for name, value in bound.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL and value:
            raise CaptureError(
                f"{type(model).__name__}.forward takes *{name}; pass its inputs by keyword instead"
            )
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            call.update(value)
        else:
            call[name] = value
    return call


def _at_least_two(call: Mapping[str, Any], batch: int) -> dict[str, Any]:
    if batch != 1:
        return dict(call)

    def double(_: Any, leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if is_batched else leaf

    doubled: dict[str, Any] = map_leaves(dict(call), double)
    return doubled


def _batch_axis(leaf: Any, batch: int) -> Any:
    is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
    return {0: Dim.AUTO} if is_batched else None


def _default_constants(
    parameters: Sequence[Any], bound: Mapping[str, Any]
) -> tuple[tuple[tuple[str], Any], ...]:
    """Arguments that the example left at their defaults: the capture fixes them too."""
    return tuple(
        ((p.name,), p.default)
        for p in parameters
        if p.name not in bound and p.default is not p.empty
    )


def _placeholder(path: tuple[Any, ...]) -> str:
    return "_".join(str(key) for key in path)


def _leaf(bound: Mapping[str, Any], path: tuple[Any, ...]) -> Tensor:
    tree: Any = bound
    for key in path:
        tree = tree[key]
    tensor: Tensor = tree
    return tensor.detach()


def _first_lines(error: BaseException) -> str:
    return one_line(error, limit=400)
