"""Program -> onnx.ModelProto: standard ops only, static shapes but for an open K, nothing superfluous."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from diffcr_compile.errors import UnsupportedModelError, one_line
from diffcr_compile.export.logical_where import say_where_in_logic
from diffcr_compile.export.lower import lower_for_onnx
from diffcr_compile.export.optimize_graph import optimize_graph
from diffcr_compile.export.regrow import UnlikeUnitsError, regrow
from diffcr_compile.export.repeats import find_repeats
from diffcr_compile.export.short_program import ShortProgram, shortened
from diffcr_compile.export.undone_reshapes import drop_undone_reshapes
from diffcr_compile.export.weights import WeightsWriter, place_of
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import Program, evaluating, run_flat
from diffcr_compile.quiet import quiet_torch

# One file then serves TensorRT 10.3 (JetPack 6) to 11.
OPSET = 20
MAX_IR_VERSION = 10
_SCOPES = "pkg.torch.onnx.name_scopes"
_TRACE = "pkg.torch.onnx.stack_trace"
# The module of a program inside the one that is exported; the names of its weights begin with it.
WRAPPED = "graph_module"
# The line of our generated forward that an exported node came from: "    name = call(...)".
_GRAPH_LINE = re.compile(r'File "<eval_with_key>[^\n]*\n\s+(\w+) = ')


class FlatCall(nn.Module):
    """A program as a module that takes and returns nothing but tensors, in graph order."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.graph_module = program.module
        self._program = program

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self._program.signature.inputs, tensors, strict=True))
        return tuple(run_flat(self._program, named))


def onnx_from_program(program: Program) -> ModelProto:
    """The ONNX graph of a program at the sizes of its example inputs; of an OPEN one, with K open.

    Inputs are named like the program's, outputs ``output`` or ``output_0``, ``output_1``, ...
    Nodes, values and constants get short names; parameters keep their qualified names where ONNX
    uses them as they are.

    Raises:
        UnsupportedModelError: the exporter fails, or the graph needs what ONNX opset 20 lacks.
    """
    return export_graph(program)[0]


def export_graph(
    program: Program, store: WeightsWriter | None = None
) -> tuple[ModelProto, dict[str, str]]:
    """The ONNX graph and its :func:`node_map`; with a `store`, its weights go straight there."""
    with evaluating(program.module):
        runs = find_repeats(program)
    if runs:
        with contextlib.suppress(UnlikeUnitsError, UnsupportedModelError):
            return _finished(_regrown(program, shortened(program, runs)), program, store)
    return graph_from_exported(exported_program(program), program, store)


def exported_program(program: Program) -> ExportedProgram:
    """The program as plain ATen ops that ONNX can say, in evaluation mode.

    Raises:
        UnsupportedModelError: the exporter fails.
    """
    refuse_bfloat16(program)
    with quiet_torch(), _named_failures(program):
        return lower_for_onnx(_exported(FlatCall(program), program))


def graph_from_exported(
    exported: ExportedProgram,
    program: Program,
    store: WeightsWriter | None = None,
    *,
    bfloat16: bool = False,
) -> tuple[ModelProto, dict[str, str]]:
    """The ONNX graph and its node map of what :func:`exported_program` made of `program`.

    With `bfloat16` its ops may compute in that type where ONNX lets them.
    """
    with quiet_torch(), _named_failures(program):
        made = _translated(exported)
    return _finished(made, program, store, bfloat16)


def _exported(flat: nn.Module, program: Program) -> ExportedProgram:
    with evaluating(flat), kept_caches(flat):
        return torch.export.export(
            flat,
            tuple(program.example.values()),
            dynamic_shapes=_open_lengths(program),
            strict=False,
        )


def _translated(exported: ExportedProgram) -> ONNXProgram:
    made = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False
    )
    assert made is not None
    return made


def _regrown(program: Program, short: ShortProgram) -> ONNXProgram:
    """The graph of the program, of an export of what does not repeat itself.

    Raises:
        UnlikeUnitsError: the program has to be exported as a whole.
    """
    refuse_bfloat16(program)
    with quiet_torch(), _named_failures(program):
        exported = _exported(short.module, program)
        weights = {*exported.state_dict, *exported.constants}
        exported = lower_for_onnx(exported)
        if {*exported.state_dict, *exported.constants} != weights:
            raise UnlikeUnitsError("values were worked out of weights, each unit has its own")
        made = _translated(exported)
        regrow(made.model, program, short, WRAPPED)
    return made


def _finished(
    made: ONNXProgram,
    program: Program,
    store: WeightsWriter | None,
    bfloat16: bool = False,
) -> tuple[ModelProto, dict[str, str]]:
    """What is left to do when every node is there."""
    with quiet_torch(), _named_failures(program):
        optimize_graph(made.model)
        drop_undone_reshapes(made.model)
    if store is not None:
        store.take(made.model)
    model: ModelProto = made.model_proto
    check_standard(model, bfloat16)
    say_where_in_logic(model)
    merge_equal_constants(model)
    shorten_names(model, list(program.signature.inputs))
    nodes = node_map(model)
    _strip(model)
    return model, nodes


def node_map(model: ModelProto) -> dict[str, str]:
    """ONNX node name -> qualified module name, or the line of the outer graph it came from.

    It reads the exporter's metadata, which the models of :func:`onnx_from_program` no longer have.
    """
    return {node.name: _origin(node) for node in model.graph.node}


def refuse_bfloat16(program: Program) -> None:
    """Raise UnsupportedModelError if the program computes in bfloat16."""
    every: dict[str, Tensor] = {**program.example, **dict(program.module.named_parameters())}
    found = [name for name, tensor in every.items() if tensor.dtype == torch.bfloat16]
    if found:
        raise UnsupportedModelError(
            f"{found[0]} is bfloat16 ({len(found)} tensors are), which ONNX opset {OPSET} lacks in "
            "Conv, TopK and Einsum. Convert the model and the example inputs with .to(torch.float32), and set "
            "export.precision: bf16 if matrix products should be bfloat16 again; or with .to(torch.float16)."
        )


def check_standard(model: ModelProto, bfloat16: bool = False) -> None:
    """Raise UnsupportedModelError unless the model is opset <= 20, IR <= 10, standard ops and types only.

    Only casts may read or write bfloat16; with `bfloat16` every op that the standard has in that type.
    """
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain})
    domains = {entry.domain: entry.version for entry in model.opset_import}
    if foreign or model.functions:
        raise UnsupportedModelError(
            f"the ONNX graph has ops outside the standard: {foreign or 'local functions'}. "
            "Replace the modules that they come from by plain torch ops."
        )
    computing = sorted(
        node.op_type
        for node in _computing_in_bfloat16(model)
        if not (bfloat16 and _has_it(node))
    )
    if computing:
        raise UnsupportedModelError(
            f"{computing} compute in bfloat16 inside the model's forward, which ONNX opset {OPSET} lacks in most "
            "ops. Take the casts to bfloat16 out of the model, or let them go to torch.float16."
        )
    if domains.get("", 0) > OPSET or model.ir_version > MAX_IR_VERSION:
        raise UnsupportedModelError(
            f"the ONNX graph has opset {domains.get('')} and IR version {model.ir_version}, "
            f"expected at most {OPSET} and {MAX_IR_VERSION}. Install the pinned torch and onnxscript."
        )


def _computing_in_bfloat16(model: ModelProto) -> list[onnx.NodeProto]:
    """Nodes that read or write bfloat16 and do more than to cast or copy it, one of each operator."""
    graph = model.graph
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.BFLOAT16} | {
        v.name
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    found = {
        node.op_type: node
        for node in graph.node
        if node.op_type not in {"Cast", "Identity"}
        and not half.isdisjoint((*node.input, *node.output))
    }
    return list(found.values())


def _has_it(node: onnx.NodeProto) -> bool:
    """Whether the standard has an operator's first input in bfloat16; its other operands follow the first."""
    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    return "tensor(bfloat16)" in schema.inputs[0].types


@contextlib.contextmanager
def _named_failures(program: Program) -> Iterator[None]:
    """Whatever the exporter raises becomes an UnsupportedModelError."""
    try:
        yield
    except UnlikeUnitsError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.onnx.export failed on the {program.stage.name} graph: {_root_cause(error)}. "
            "Replace the op that it names by plain torch ops."
        ) from error


def _open_lengths(program: Program) -> tuple[Any, ...] | None:
    """The axes that stay open; None if all shapes are static."""
    if not program.kept_inputs:
        return None
    return (
        tuple(
            {0: Dim(name, min=1, max=program.block(program.kept_inputs[name]).num_tokens)}
            if name in program.kept_inputs
            else {}
            for name in program.example
        ),
    )


def _root_cause(error: BaseException) -> str:
    """The innermost message: the exporter wraps it in pages about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, limit=600)


def merge_equal_constants(model: ModelProto) -> None:
    """One initializer per content: the exporter repeats tensors that several nodes use."""
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for tensor in model.graph.initializer:
        key = _content(tensor)
        if key in first:
            renamed[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(tensor)
    outputs = {value.name for value in model.graph.output}
    if not renamed or outputs & set(renamed):
        return
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    _rename_values(model, renamed)


def _content(tensor: TensorProto) -> bytes:
    """Equal for tensors of one type, shape and content; what lies in a file is known by its place."""
    header = f"{tensor.data_type}{list(tensor.dims)}".encode()
    if tensor.data_location == TensorProto.EXTERNAL:
        return header + repr(place_of(tensor)).encode()
    return hashlib.sha256(header + onnx.numpy_helper.to_array(tensor).tobytes()).digest()


def shorten_names(model: ModelProto, inputs: list[str]) -> None:
    """Names of values are half of a small graph's bytes."""
    graph = model.graph
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    found = [value.name for value in graph.output]
    labels = ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]
    names |= dict(zip(found, labels, strict=True))
    taken = set(names.values())
    for number, tensor in enumerate(graph.initializer):
        whole = tensor.name.removeprefix(f"{WRAPPED}.")
        # A dot tells a parameter's own name from a constant that the exporter made up.
        names.setdefault(tensor.name, _free(whole if "." in whole else f"c{number}", taken))
    counter = 0
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        for output in node.output:
            if output and output not in names:
                names[output] = _free(f"v{counter}", taken)
                counter += 1
    _rename_values(model, names)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _rename_values(model: ModelProto, names: Mapping[str, str]) -> None:
    graph = model.graph
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _strip(model: ModelProto) -> None:
    """Drop what no runtime reads: traces, documentation, inferable shapes, default attributes."""
    graph = model.graph
    graph.name = "main_graph"
    model.producer_name, model.producer_version, model.doc_string = "diffcr_compile", "", ""
    for field in (model.metadata_props, graph.metadata_props, graph.value_info):
        del field[:]
    graph.doc_string = ""
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        # TensorRT before 10.9 refuses a ScatterND whose `reduction` is present, even as "none".
        spoken = [a for a in node.attribute if not (a.name == "reduction" and a.s == b"none")]
        if len(spoken) != len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(spoken)


def _origin(node: onnx.NodeProto) -> str:
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    scopes = json.loads(metadata[_SCOPES].replace("'", '"')) if _SCOPES in metadata else []
    module = next((s for s in reversed(scopes[:-1]) if s), "").removeprefix(WRAPPED)
    if module.strip("."):
        return module.strip(".")
    line = _GRAPH_LINE.search(metadata.get(_TRACE, ""))
    return line.group(1) if line else ""
