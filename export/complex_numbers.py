"""Complex tensors of an exported program -> real ones with a last axis of 2, which ONNX can say."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.complex_ops import handler_of, is_complex
from diffcr_compile.export.real_emitter import Complex, Emitter

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def has_complex_numbers(exported: ExportedProgram) -> bool:
    """Whether a complex tensor occurs anywhere in the program."""
    graphs = (
        m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)
    )
    return any(_gives_complex(node) for graph in graphs for node in graph.nodes)


def use_real_numbers(exported: ExportedProgram) -> ExportedProgram:
    """The same program without complex numbers; the same object if it has none.

    Before:  ``y = mul(view_as_complex(x), table (N, 4) complex64)``
    After:   products and sums of ``x[..., 0]``, ``x[..., 1]``, ``table[..., 0]`` and ``table[..., 1]``

    Each complex tensor of shape S becomes a real one of shape (*S, 2): real part, imaginary part. So do
    complex buffers and constants, and complex inputs, whose callers must pass `view_as_real`.

    Args:
        exported: static shapes; it is left alone.

    Raises:
        UnsupportedModelError: an output is complex, or an op on complex numbers has no known real form.
    """
    if not has_complex_numbers(exported):
        return exported
    # Without in-place writes and composite ops, of which there are too many to know.
    program: ExportedProgram = exported.run_decompositions({})
    _Rewriter(program).run()
    for node in program.graph.nodes:
        if node.target in _VIEWS:  # strides are others now, and a reshape does not mind
            node.target = aten.reshape.default
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    return program


class _Rewriter:
    """Replaces the complex nodes of a functional graph one after the other."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = program.graph
        fakes = (node.meta.get("val") for node in self.graph.nodes)
        modes = (f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
        self.emit = Emitter(self.graph, next(modes))
        self.first_call = next(
            n for n in self.graph.nodes if n.op not in {"placeholder", "get_attr"}
        )
        self.values: dict[fx.Node, Any] = {}
        self.replaced: list[fx.Node] = []

    def run(self) -> None:
        kinds = {s.arg.name: s for s in self.program.graph_signature.input_specs}
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                if is_complex(node.meta.get("val")):
                    self._input(node, kinds[node.name])
            elif node.op == "output":
                self._output(node)
            elif _gives_complex(node) or any(n in self.values for n in node.all_input_nodes):
                self._call(node)
        for node in reversed(self.replaced):
            self.graph.erase_node(node)

    def _input(self, node: fx.Node, spec: Any) -> None:
        like = node.meta["val"]
        with self.emit.mode:
            node.meta["val"] = torch.view_as_real(like.resolve_conj())
        node.meta.pop("tensor_meta", None)
        # another node than the placeholder, so that what reads its real pairs is not taken for complex
        self.emit.before(self.first_call)
        self.values[node] = Complex(like, both=self.emit(aten.alias.default, node))
        if spec.kind == InputKind.USER_INPUT:
            return
        for tensors in (self.program.state_dict, self.program.constants):
            if spec.target in tensors:
                tensors[spec.target] = _as_real(tensors[spec.target])

    def _output(self, node: fx.Node) -> None:
        results: Any = node.args[0]
        for number, value in enumerate(results):
            if value in self.values:
                raise UnsupportedModelError(
                    f"output {number} of the model ({value.name}) is complex, which ONNX cannot return. "
                    "Return torch.view_as_real of it."
                )

    def _call(self, node: fx.Node) -> None:
        self.replaced.append(node)
        if node.target is aten._assert_tensor_metadata.default:
            return  # it says of the complex tensor what is no longer so
        self.emit.before(node)
        if node.target is operator.getitem:
            made: Any = self._item(node)
        else:
            made = self._handled(node)
        if isinstance(made, fx.Node) and not _gives_complex(node):
            self._replace(node, made)
        else:
            self.values[node] = made

    def _item(self, node: fx.Node) -> Complex:
        sequence, number = self.values[node.all_input_nodes[0]], node.args[1]
        return Complex(node.meta["val"], both=self.emit(operator.getitem, sequence, number))

    def _handled(self, node: fx.Node) -> Any:
        target: Any = node.target
        name = target._schema.name.removeprefix("aten::") if _is_aten(target) else str(target)
        handler = handler_of(name) if _is_aten(target) else None
        made = handler(self.emit, self._arguments(node)) if handler else None
        if made is None:
            raise UnsupportedModelError(
                f"{target} computes with complex numbers, which ONNX lacks, and no form of it in real "
                f"ones is known (node {node.name}). Write that part of the model with real tensors."
            )
        return made

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, defaults filled in, complex tensors as `Complex`."""
        target: Any = node.target
        schema = target._schema.arguments
        given = (
            dict(zip((entry.name for entry in schema), node.args, strict=False)) | node.kwargs
        )
        full = {entry.name: given.get(entry.name, entry.default_value) for entry in schema}
        return {name: self._value(value) for name, value in full.items()}

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values.get(value, value)
        if isinstance(value, (list, tuple)):
            return [self._value(item) for item in value]
        return value

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        found, expected = made.meta["val"], node.meta["val"]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), node.name
        node.replace_all_uses_with(made)
        self.program.graph_signature.replace_all_uses(node.name, made.name)


def _is_aten(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _gives_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return any(map(is_complex, value if isinstance(value, (tuple, list)) else [value]))


def _as_real(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach().resolve_conj()).contiguous()
    return (
        nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real
    )
