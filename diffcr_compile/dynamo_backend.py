"""``torch.compile(model, backend="diffcr", options={"artifact": "out/"})``.

Dynamo traces the dense model as for any backend; the traced graph is used to learn which inputs the call
has and what the dense model answers. What runs then are the artifact's FROZEN graphs around the same
model, one per timestep bucket, each handed over to inductor (or the backend named as ``inner``) at its
first use.
"""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing
from torch.fx.graph import CodeGen

from diffcr_compile.drop_in import FrozenGraphs
from diffcr_compile.errors import UsageError
from diffcr_compile.export.parity import compare
from diffcr_compile.manifest import read_manifest
from diffcr_compile.program import DiTGraph, Program, run_flat
from diffcr_compile.rebuild import Rebuilt, rebuild

OPTIONS = ("artifact", "inner", "model")
# Dynamo's graph and ours run the same kernels on the dense weights; they may be fused differently.
SAME_ANSWER = 1e-4

Compiled = Callable[..., Any]


def diffcr(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """A backend of torch.compile that runs an artifact's schedule, for inference.

    Args:
        gm: the dense model as Dynamo traced it.
        example_inputs: its inputs.
        options: ``artifact``, the folder; ``inner``, what compiles the FROZEN graphs, by name or as a
            callable (default inductor); ``model``, the dense model, where it cannot be told from the trace.
        mode: not supported; pass options to the inner backend as a callable.

    Raises:
        UsageError: the options are wrong, the trace is in pieces, or this is not the artifact's model.
    """
    chosen = _checked_options(options, mode)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        raise UsageError(
            f"torch.compile breaks the model's graph ({reason.reason}), and a schedule is for the whole "
            "model. Use the frozen graphs themselves: DiffusersTransformer.from_artifact(folder, "
            "backend='torch', model=model).",
            code="DCR-U053",
        )
    if torch.is_grad_enabled():
        raise UsageError(
            "the diffcr backend is for inference: call the compiled model inside torch.no_grad() or "
            "torch.inference_mode()",
            code="DCR-U053",
        )
    folder = Path(chosen["artifact"])
    with tracing(None), torch.no_grad():  # or nested captures would take Dynamo's fake tensors
        model = chosen.get("model") or _traced_model()
        made = rebuild(folder, model)
        places = _places(gm, made.captured)
        _check_answer(gm, example_inputs, made, places, folder)
        return _Dispatch(folder, made, places, chosen["inner"])


class _Dispatch:
    """What Dynamo calls in place of the dense graph: the graph of the timestep's bucket."""

    def __init__(
        self, folder: Path, made: Rebuilt, places: Mapping[str, int], inner: str | Compiled
    ) -> None:
        self._graphs = FrozenGraphs(read_manifest(folder), made.frozen)
        self._places, self._inner = places, inner
        self._example = made.captured.example
        self._compiled: dict[int, Compiled] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        tensors = _tensors(self._example, self._places, inputs)
        bucket = self._graphs.bucket_of(tensors)
        if bucket not in self._compiled:
            flat = _plain_graph(self._graphs.graphs[bucket])
            compiler = torch._dynamo.lookup_backend(self._inner)
            with tracing(None):
                self._compiled[bucket] = compiler(flat, list(tensors.values()))
        return tuple(self._compiled[bucket](*tensors.values()))


def _checked_options(options: Mapping[str, Any] | None, mode: str | None) -> dict[str, Any]:
    given = dict(options or {})
    unknown = sorted(set(given) - set(OPTIONS))
    if "artifact" not in given or unknown or mode is not None:
        raise UsageError(
            "the diffcr backend takes options={'artifact': folder}, and beside it 'inner' and 'model'; got "
            f"options={sorted(given)}{'' if mode is None else f', mode={mode!r}'}",
            code="DCR-U053",
        )
    return {"inner": "inductor", **given}


def _traced_model() -> nn.Module:
    """The module whose forward Dynamo is tracing: Dynamo's own record of it, up the stack."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        scope = getattr(frame.f_locals.get("self"), "local_scope", None)
        if isinstance(scope, dict) and isinstance(scope.get("self"), nn.Module):
            found: nn.Module = scope["self"]
            return found
        frame = frame.f_back
    raise UsageError(
        "the model that torch.compile traces cannot be told. Compile the module itself "
        "(torch.compile(model, ...), not a function around it), or pass options={'model': model, ...}.",
        code="DCR-U053",
    )


def _places(gm: fx.GraphModule, captured: Program) -> dict[str, int]:
    """Graph input -> position among the inputs of Dynamo's graph; one that the model ignores is missing."""
    wanted = {tuple(path): name for name, path in captured.signature.inputs.items()}
    star = {p.name for p in captured.signature.parameters if p.kind is p.VAR_KEYWORD}
    found = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for position, node in enumerate(placeholders):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None)
        path = _path(str(name() if callable(name) else name))
        if path and path[0] in star:
            path = path[1:]
        if path in wanted:
            found[wanted[path]] = position
    return found


def _path(source: str) -> tuple[Any, ...]:
    """``L['added']['size'][0]`` -> ('added', 'size', 0); () for what is no argument."""
    try:
        node: ast.expr = ast.parse(source, mode="eval").body
    except SyntaxError:
        return ()
    keys: list[Any] = []
    while isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        keys.append(node.slice.value)
        node = node.value
    is_local = isinstance(node, ast.Name) and node.id == "L"
    return tuple(reversed(keys)) if is_local else ()


def _tensors(
    example: Mapping[str, Tensor], places: Mapping[str, int], inputs: Sequence[Any]
) -> dict[str, Tensor]:
    """Inputs of our graphs, out of those of Dynamo's; what the model ignores is the example's."""
    tensors = {n: inputs[places[n]] if n in places else t for n, t in example.items()}
    for name, tensor in tensors.items():
        expected = example[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UsageError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but the artifact was built for "
                f"{expected.dtype} of shape {tuple(expected.shape)}, and graphs are static",
                code="DCR-U021",
            )
    return tensors


def _check_answer(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    made: Rebuilt,
    places: Mapping[str, int],
    folder: Path,
) -> None:
    """Raise unless Dynamo's graph and our dense one answer this call alike: same inputs, same constants."""
    expected = [value for value in gm(*inputs) if isinstance(value, Tensor)]
    tensors = _tensors(made.captured.example, places, inputs)
    found = run_flat(made.captured, tensors)
    scale = max(float(value.abs().max()) for value in expected)
    row = compare("Dynamo -> CAPTURED", found, expected, SAME_ANSWER * max(scale, 1.0))
    if not row.passed:
        raise UsageError(
            f"this call is another one than {folder} was built for: the dense model's answers differ by "
            f"{row.max_abs:.1e}. Call it with the same non-tensor arguments as when it was compiled.",
            code="DCR-U053",
        )


def _plain_graph(graph: DiTGraph) -> fx.GraphModule:
    """The graph with its placeholders as parameters and a tuple of tensors as output, as backends take it."""
    copied = graph.program.copy_graph()
    copied.set_codegen(CodeGen())
    output = next(iter(copied.find_nodes(op="output")))
    (values,) = output.args
    flat = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, fx.Node)]
    output.args = (tuple(flat),)
    return fx.GraphModule(graph, copied, class_name="FrozenGraph")
