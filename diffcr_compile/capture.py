"""nn.Module -> CAPTURED program: one ``call_module`` node per routable block, the rest plain ATen.

``torch.export`` gives one flat graph, out of which the blocks' bodies are cut (``block_calls.py``):

* modules that are not blocks stay inlined, so an outer call into a submodule of a block (the DiT of
  diffusers calls ``transformer_blocks.0.norm1.emb`` again after its blocks) is just nodes;
* parameters and buffers are the user's own, by qualified name, so nothing is copied and training
  the graph trains what the user sees;
* what depends on constants only is computed once (``fold.py``).

Where ``torch.export`` fails, the model is run once on real tensors and recorded (``trace.py``). Either
way the graph is compared with the model before it is used (``check_capture.py``), on the example and on
inputs that the capture has not seen.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from diffcr_compile.block_calls import Input, graph_with_block_calls
from diffcr_compile.blocks import BlockSpec, Path, Refusal, get_leaf, map_leaves
from diffcr_compile.check_capture import check_capture
from diffcr_compile.dynamo_state import forgotten_failures
from diffcr_compile.errors import (
    CaptureError,
    UnsupportedModelError,
    VerificationError,
    one_line,
)
from diffcr_compile.fold import fold_constants
from diffcr_compile.input_names import input_names
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.outputs import OutputForm, OutputForms
from diffcr_compile.program import DiTGraph, Program, Stage, batch_size, map_batched
from diffcr_compile.quiet import quiet_torch
from diffcr_compile.randomness import NOT_ONE_FUNCTION
from diffcr_compile.signature import (
    CallCodeGen,
    CallSignature,
    bind_call,
    keyword_call,
    split_leaves,
)
from diffcr_compile.static_picks import make_picks_static
from diffcr_compile.trace import trace_graph
from diffcr_compile.value_reads import AliasesOfData
from diffcr_compile.views import show_in_graph

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_CURE = (
    "Typical causes are branches on tensor values and numbers read from tensors with .item() or "
    ".numpy() in forward; move them out of forward or make them depend on shapes only."
)
# Words of a failure -> what to say in the place of that.
_CURES = {
    NOT_ONE_FUNCTION: "",
    "flex_attention": "The model calls flex_attention, which compiles itself for the tokens it is first given, so no graph for other "
    "engines can hold it. Let it call torch.nn.functional.scaled_dot_product_attention, with what score_mod and "
    "block_mask do as attn_mask; in models of diffusers: model.set_attention_backend('native').",
}
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

    Inputs from which the model's forward reads numbers are fixed to their values in the example where
    that can be, see ``Program.fixed_inputs``.

    Raises:
        CaptureError: neither torch.export nor recording gives a graph that computes what the model does.
    """
    _refuse_names(model)
    call = _Call(model, args, kwargs, sample)
    names = [spec.name for spec in blocks]
    failures = []
    for what, way in _WAYS.items():
        try:
            forms = OutputForms()
            with forgotten_failures(), forms.flat(model):
                found = way(model, call, names)
            program = _program(found, forms.found, call, blocks, refused)
            check_capture(program, model, call.bound)
        except (UnsupportedModelError, VerificationError) as error:
            failures.append(f"{what}: {error.message}")
            continue
        except Exception as error:  # noqa: BLE001 - torch's tracers raise dozens of types
            failures.append(f"{what}: {one_line(error)}")
            continue
        return program
    said = "\n".join(failures)
    cure = next((cure for words, cure in _CURES.items() if words in said), _CURE)
    raise CaptureError(f"{type(model).__name__} cannot be captured.\n{said}\n{cure}".strip())


def _refuse_names(model: nn.Module) -> None:
    """Refuse a module or parameter that is called like something a graph module has itself."""
    own = {*dir(DiTGraph), *vars(fx.GraphModule({}, fx.Graph()))} - {
        *dir(nn.Module),
        *vars(nn.Module()),
    }
    names = [n for n, _ in model.named_children()]
    names += [n for n, _ in model.named_parameters(recurse=False)]
    names += [n for n, _ in model.named_buffers(recurse=False)]
    taken = sorted(own & set(names))
    if taken:
        raise CaptureError(
            f"{type(model).__name__} has attributes called {', '.join(taken)}, and so has the graph module "
            "that is made of it: one would hide the other. Rename them, or wrap the model in a module that "
            "calls it."
        )


class _Call:
    """A call of the model, taken apart.

    Attributes:
        parameters: of the model's forward.
        bound: the given arguments by parameter name.
        paths: placeholder name -> path into `bound`, tensors only.
        constants: (path, value) of everything else.
        sample: placeholder of the noisy sample, if it is known.
        timestep: placeholder of the timestep, if it is known.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sample: Path
    ) -> None:
        self.parameters, self.bound = bind_call(model, args, kwargs)
        for parameter in self.parameters:
            if parameter.kind is parameter.VAR_POSITIONAL and self.bound.get(parameter.name):
                raise CaptureError(
                    f"{type(model).__name__}.forward takes *{parameter.name}; pass its inputs by "
                    "keyword instead"
                )
        tensors, constants = split_leaves(self.bound)
        for path, value in constants:
            if not isinstance(value, _PLAIN):  # tensors inside it would become constants
                raise CaptureError(
                    f"{type(model).__name__}.forward is given {'.'.join(map(str, path))}, which is a "
                    f"{type(value).__name__}; a graph takes tensors, numbers, strings, and tuples, lists "
                    "and dicts of them. Wrap the model in a module whose forward takes the tensors and "
                    f"makes the {type(value).__name__} of them, or leave it out where it is optional."
                )
        # What comes as **kwargs is called what the caller calls it.
        other = next((p.name for p in self.parameters if p.kind is p.VAR_KEYWORD), None)
        self.paths = input_names(tensors, [p.name for p in self.parameters], other)
        self.constants = tuple(constants) + _default_constants(self.parameters, self.bound)
        self.example = {
            name: get_leaf(self.bound, path).detach() for name, path in self.paths.items()
        }
        wanted = _bound_path(sample, list(self.bound), other)
        self.sample = next((n for n, path in self.paths.items() if path == wanted), None)
        self.timestep = next((n for n in self.example if n in TIMESTEP_NAMES), None)

    def fixable(self) -> list[str]:
        """Inputs that may be fixed to the example's values: masks, lengths, numbers of things.

        The noisy sample and the timestep change at every call, and other fractions are embeddings.
        """
        if self.sample is None:
            return []
        return [
            name
            for name, tensor in self.example.items()
            if name not in {self.sample, self.timestep} and _is_whole(tensor)
        ]


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A graph, what its nodes refer to, and how it came about."""

    graph: fx.Graph
    root: Mapping[str, Any]
    out_spec: pytree.TreeSpec
    dynamic_batch: bool
    history: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


def _exported(
    model: nn.Module, call: _Call, names: Sequence[str], *, free_batch: bool
) -> _Captured:
    """By torch.export."""
    expanded = keyword_call(call.parameters, call.bound)
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
        raise CaptureError(f"the blocks cannot be cut out: {one_line(error)}") from error
    return _Captured(graph, root, exported.call_spec.out_spec, free_batch)


def _recorded(model: nn.Module, call: _Call, names: Sequence[str]) -> _Captured:
    """By running the model."""
    try:
        found = trace_graph(model, call.bound, call.paths, names, call.fixable())
    except CaptureError:
        raise
    except Exception as error:  # the model may raise anything
        raise CaptureError(one_line(error)) from error
    line = "capture: recorded on real tensors, because torch.export gives no static graph"
    if found.fixed:
        line += (
            f"; forward reads the values of {', '.join(found.fixed)}: fixed to the example's"
        )
    return _Captured(
        found.graph,
        found.root,
        found.out_spec,
        dynamic_batch=False,
        history=(line,),
        fixed=found.fixed,
    )


_Way = Callable[[nn.Module, _Call, Sequence[str]], _Captured]
_WAYS: dict[str, _Way] = {
    "With torch.export and a free batch": functools.partial(_exported, free_batch=True),
    "With torch.export and a fixed batch": functools.partial(_exported, free_batch=False),
    "Recorded on real tensors": _recorded,
}


def _program(
    found: _Captured,
    form: OutputForm | None,
    call: _Call,
    blocks: Sequence[BlockSpec],
    refused: Sequence[Refusal],
) -> Program:
    fixed = tuple((call.paths[name], call.example[name].clone()) for name in found.fixed)
    paths = {name: path for name, path in call.paths.items() if name not in found.fixed}
    signature = CallSignature(
        call.parameters, paths, (*fixed, *call.constants), found.out_spec, form
    )
    root = dict(found.root)
    try:
        fold_constants(found.graph, root)
        make_picks_static(found.graph, root)
        show_in_graph(found.graph, root, blocks)
        found.graph.set_codegen(CallCodeGen(signature))
        module = DiTGraph(root, found.graph, class_name="DiTGraph").eval()
    except Exception as error:  # the exporter puts objects of its own into some graphs
        raise CaptureError(f"the graph cannot be compiled: {one_line(error)}") from error
    return Program(
        module=module,
        stage=Stage.CAPTURED,
        signature=signature,
        example={name: call.example[name] for name in paths},
        blocks=tuple(blocks),
        refused=tuple(refused),
        sample_input=call.sample,
        timestep_input=call.timestep,
        dynamic_batch=found.dynamic_batch,
        history=found.history,
    ).attached()


def _is_whole(tensor: Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.is_complex():
        return False
    return not tensor.is_floating_point() or torch.equal(tensor, tensor.round())


def _bound_path(path: Path, parameters: Sequence[str], other: str | None) -> Path:
    """A path in (args, kwargs) as one in the arguments by parameter name; `other` is ``**kwargs``."""
    if not path:
        return ()
    if path[0] == 0:
        return (parameters[int(path[1])], *path[2:])
    keyword = str(path[1])
    return path[1:] if keyword in parameters or other is None else (other, *path[1:])


def _export(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], free_batch: int | None
) -> ExportedProgram:
    """torch.export; with `free_batch`, axes of that size in front of tensors may change later."""
    shapes = None
    if free_batch is not None:
        # torch.export specialises sizes 0 and 1, so one sample is captured as two equal ones.
        if free_batch == 1:
            call = map_batched(dict(call), 1, lambda tensor: torch.cat([tensor, tensor]))
        size = max(free_batch, 2)
        shapes = pytree.tree_map(lambda leaf: _batch_axis(leaf, size), call)
    try:
        return _quiet_export(model, call, names, shapes)
    except Exception as error:  # torch.export raises dozens of types
        raise CaptureError(one_line(error)) from error


def _quiet_export(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], shapes: Any
) -> ExportedProgram:
    # The exporter marks the tensors it was given, prints, and puts autograd switches into the graph.
    call = map_leaves(
        dict(call), lambda _, t: t.detach().clone() if isinstance(t, Tensor) else t
    )
    with (
        quiet_torch(),
        torch.no_grad(),
        AliasesOfData(),
        kept_caches(model),
    ):
        return torch.export.export(
            model,
            (),
            call,
            strict=False,
            preserve_module_call_signature=tuple(names),
            dynamic_shapes=shapes,
        )


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
