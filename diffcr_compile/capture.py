"""nn.Module -> CAPTURED program: one ``call_module`` node per routable block, the rest plain ATen.

``torch.export`` with ``preserve_module_call_signature`` plus ``unflatten`` keeps the blocks as
calls with their real arguments. What comes out is then rebuilt into one flat graph:

* modules that are not blocks are inlined, so an outer call into a submodule of a block (the DiT of
  diffusers calls ``transformer_blocks.0.norm1.emb`` again after its blocks) is just nodes;
* pytree helpers around the calls are evaluated away;
* parameters and buffers are the user's own, by qualified name, so nothing is copied and training
  the graph trains what the user sees.

The bodies of the blocks are the user's modules: they take any number of tokens.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import _pytree as fx_pytree
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from diffcr_compile.blocks import BlockSpec, Path, Refusal, map_leaves
from diffcr_compile.errors import CaptureError
from diffcr_compile.program import DiTGraph, Program, Stage, batch_size
from diffcr_compile.signature import CallCodeGen, CallSignature, bind_call, split_leaves

aten = torch.ops.aten
# What models call the input that says how noisy the sample is.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")
# Checks of the exporter that hold by construction; they would pin dtypes and devices.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}


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
        CaptureError: torch.export cannot trace the model.
    """
    parameters, bound = bind_call(model, args, kwargs)
    tensor_paths, constants = split_leaves(bound)
    example = {_placeholder(path): _leaf(bound, path) for path in tensor_paths}
    exported, dynamic_batch = _export(model, bound, [b.name for b in blocks], example)
    signature = CallSignature(
        parameters=parameters,
        inputs={_placeholder(path): path for path in tensor_paths},
        constants=tuple(constants) + _default_constants(parameters, bound),
        out_spec=exported.call_spec.out_spec,
    )
    builder = _GraphBuilder(model, exported, {b.name for b in blocks})
    graph = builder.build(list(signature.inputs), bound)
    graph.set_codegen(CallCodeGen(signature))
    module = DiTGraph(builder.root, graph, class_name="DiTGraph").eval()
    return Program(
        module=module,
        stage=Stage.CAPTURED,
        signature=signature,
        example=example,
        blocks=tuple(blocks),
        refused=tuple(refused),
        sample_input=_sample_name(sample, list(bound)),
        timestep_input=next((n for n in example if n in TIMESTEP_NAMES), None),
        dynamic_batch=dynamic_batch,
    ).attached()


def _sample_name(sample: Path, parameters: Sequence[str]) -> str | None:
    """Placeholder of the sample: positional arguments are known by their parameter's name."""
    if not sample:
        return None
    first = parameters[int(sample[1])] if sample[0] == 0 else sample[1]
    return _placeholder((first, *sample[2:]))


def _export(
    model: nn.Module,
    bound: Mapping[str, Any],
    names: Sequence[str],
    example: Mapping[str, Tensor],
) -> tuple[ExportedProgram, bool]:
    """torch.export, with the batch axis free if the model allows it."""
    call = _expand_variadic(model, bound)
    batch = batch_size(example)
    two = _at_least_two(call, batch)
    # torch.export specialises sizes 0 and 1, so one sample is captured as two equal ones.
    shapes = pytree.tree_map(lambda leaf: _batch_axis(leaf, max(batch, 2)), two)
    try:
        return _quiet_export(model, two, names, shapes), True
    except Exception as error:  # noqa: BLE001 - torch.export raises dozens of types
        first = error
    try:
        return _quiet_export(model, call, names, None), False
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace {type(model).__name__}: {_first_lines(error)}\n"
            f"(with a free batch axis: {_first_lines(first)})\n"
            "Typical causes are branches on tensor values and calls to .item() or .numpy() in "
            "forward; move them out of forward or make them depend on shapes only."
        ) from error


def _quiet_export(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], shapes: Any
) -> ExportedProgram:
    with warnings.catch_warnings():
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
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


class _GraphBuilder:
    """Rebuilds an unflattened export into one flat graph whose only modules are the blocks."""

    def __init__(self, model: nn.Module, exported: ExportedProgram, blocks: set[str]) -> None:
        self.model = model
        with warnings.catch_warnings():  # it warns about the pytree specs that it adds itself
            warnings.simplefilter("ignore")
            self.source = torch.export.unflatten(exported)
        self.positional = {  # block -> how many positional arguments the user's call had
            entry.fqn: entry.signature.in_spec.child(0).num_children
            for entry in exported.module_call_graph
            if entry.fqn in blocks and entry.signature is not None
        }
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self._attributes: dict[str, fx.Node] = {}

    def build(self, placeholders: Sequence[str], bound: Mapping[str, Any]) -> fx.Graph:
        every = pytree.tree_leaves(dict(bound))
        tensors = iter([self.graph.placeholder(name) for name in placeholders])
        inputs = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in every]
        source_graph: Any = self.source.graph
        count = len(source_graph.find_nodes(op="placeholder"))
        if count != len(inputs):
            inputs = [value for value in inputs if isinstance(value, fx.Node)]
        if count != len(inputs):
            raise CaptureError(
                f"the exported graph has {count} inputs, the call has {len(inputs)} tensors; "
                "pass plain tensors, tuples, lists and dicts as inputs"
            )
        outputs = self._inline(source_graph, self.source, "", inputs)
        self.graph.output(list(pytree.tree_leaves(outputs)))
        self.graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
        self.graph.lint()
        return self.graph

    def _inline(
        self, graph: fx.Graph, owner: nn.Module, prefix: str, inputs: Sequence[Any]
    ) -> Any:
        """Copy `graph` node by node; structures made by pytree helpers exist only while copying."""
        values: dict[fx.Node, Any] = {}
        waiting = iter(inputs)
        for node in graph.nodes:
            if node.op == "output":
                return self._lookup(values, node.args[0])
            if node.op == "placeholder":
                values[node] = next(waiting)
            elif node.op == "get_attr":
                values[node] = self._attribute(owner, prefix, node.target)
            elif node.op == "call_module":
                values[node] = self._call(owner, prefix, node, values)
            elif node.target not in _ASSERTIONS:
                values[node] = self._function(node, values)
        raise CaptureError(f"the exported graph of {prefix or 'the model'} has no output")

    def _lookup(self, values: Mapping[fx.Node, Any], argument: Any) -> Any:
        return map_arg(argument, lambda node: values[node])

    def _function(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args = [_resolve(values, a) for a in node.args]
        if node.target is pytree.tree_unflatten:
            return pytree.tree_unflatten(args[0], args[1])
        if node.target is fx_pytree.tree_flatten_spec:
            return _flatten(args[0], args[1], self.graph)
        if node.target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]
        kwargs = {key: _resolve(values, value) for key, value in node.kwargs.items()}
        return self.graph.create_node(
            "call_function", node.target, tuple(args), kwargs, name=node.name
        )

    def _call(
        self, owner: nn.Module, prefix: str, node: fx.Node, values: Mapping[fx.Node, Any]
    ) -> Any:
        target = str(node.target)
        name = _without_copies(prefix + target)
        args = [_resolve(values, a) for a in node.args]
        kwargs = {key: _resolve(values, value) for key, value in node.kwargs.items()}
        if name not in self.positional:
            inner = owner.get_submodule(target)
            inner_graph: Any = inner.graph
            return self._inline(
                inner_graph, inner, f"{prefix}{target}.", [*args, *kwargs.values()]
            )
        block = self.model.get_submodule(name)
        # With a free batch axis, unflatten puts tensors that carry lifted sizes in front.
        args = args[len(args) - self.positional[name] :]
        self.root[name] = block
        return self.graph.create_node(
            "call_module", name, tuple(args), kwargs, name=name.replace(".", "_")
        )

    def _attribute(self, owner: nn.Module, prefix: str, target: str) -> Any:
        value: Any = owner
        for part in target.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            return value  # a pytree spec
        name = _without_copies(prefix + target)
        if name not in self._attributes:
            self.root[name] = _user_tensor(self.model, name, value)
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]


def _resolve(values: Mapping[fx.Node, Any], argument: Any) -> Any:
    """Replace nodes by their values; a value may be a structure, which map_arg would refuse."""
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, (list, tuple)):
        return (
            [_resolve(values, a) for a in argument]
            if isinstance(argument, list)
            else tuple(_resolve(values, a) for a in argument)
        )
    if isinstance(argument, dict):
        return {key: _resolve(values, a) for key, a in argument.items()}
    if isinstance(argument, slice):
        return slice(
            *(_resolve(values, a) for a in (argument.start, argument.stop, argument.step))
        )
    return argument


def _flatten(value: Any, spec: pytree.TreeSpec, graph: fx.Graph) -> list[Any]:
    """Leaves of a block's output: the block's node itself, or getitem nodes into it."""
    if not isinstance(value, fx.Node):
        return list(pytree.tree_leaves(value))
    found: list[Any] = []
    pending: list[tuple[Any, pytree.TreeSpec]] = [(value, spec)]
    while pending:
        node, part = pending.pop(0)
        if part.is_leaf():
            found.append(node)
            continue
        keys = part.context if part.type is dict else range(part.num_children)
        children = [
            (graph.call_function(operator.getitem, (node, key)), part.child(i))
            for i, key in enumerate(keys)
        ]
        pending = children + pending
    return found


def _without_copies(name: str) -> str:
    """``blocks.0@1.norm`` -> ``blocks.0.norm``: unflatten numbers repeated calls of a module."""
    return ".".join(part.split("@")[0] for part in name.split("."))


def _user_tensor(model: nn.Module, name: str, traced: Tensor) -> Tensor:
    """The user's own parameter or buffer of that name; the traced tensor if there is none."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    if (
        isinstance(value, Tensor)
        and value.shape == traced.shape
        and value.dtype == traced.dtype
    ):
        return value
    return traced.detach()
