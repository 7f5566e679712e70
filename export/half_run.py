"""Run an exported program on the CPU: in float32 with the range of each product, or as half-precision hardware does.

ONNX Runtime's CPU cannot judge a float16 graph: it computes products in float32 and drops casts between
them, so that little is rounded and nothing overflows; bfloat16 it does not run at all. Here products are summed in
float32 and rounded to the half type where they leave a kernel, as TensorRT's do.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from diffcr_compile.export.half import HALF_TYPES, PRODUCTS, HalfPrecision, products
from diffcr_compile.program import Program

aten = torch.ops.aten
LARGEST_HALF = 65504.0
_MASK = 3
# a product -> called with what it reads
Watch = Mapping[fx.Node, Callable[[Tensor], None]]


@dataclasses.dataclass(frozen=True)
class Range:
    """The largest magnitude among the values that products of a block read or write.

    Attributes:
        largest: infinity if a value was not finite.
        where: the product, by its node in the exported graph.
    """

    largest: float
    where: str

    def joined(self, other: Range) -> Range:
        return self if self.largest >= other.largest else other


class _Run(fx.Interpreter):
    """Runs an exported program on tensors by name."""

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__(exported.graph_module)
        self.extra_traceback = False
        self._exported = exported

    @torch.no_grad()
    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The program's outputs; inputs are in the order of its example."""
        given = [torch.view_as_real(t) if t.is_complex() else t for t in tensors.values()]
        found = self.run(*graph_inputs(self._exported, given))
        return [value for value in found if isinstance(value, Tensor)]


class Ranges(_Run):
    """Runs a float32 program, keeps the range of every block's products and what each TopK chose.

    Products in `watch` also show what they read to their watcher.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        program: Program,
        watch: Watch = types.MappingProxyType({}),
    ) -> None:
        super().__init__(exported)
        self._blocks = products(exported.graph, program)
        self._watch = watch
        self.found: dict[str, Range] = {}
        self.chosen: list[Tensor] = []

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """As every run; `chosen` is then of these inputs."""
        self.chosen = []
        return super().outputs(tensors)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is aten.topk.default:
            self.chosen.append(result[1])
        if n in self._blocks:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n in self._watch:
                self._watch[n](args[0])
            values = [v for v in (*_tensors(args, kwargs, n), result) if v.is_floating_point()]
            largest = max(_largest(value) for value in values)
            if n.target is aten.scaled_dot_product_attention.default:
                largest = max(largest, _scores(args, kwargs))
            block, found = self._blocks[n], Range(largest, n.name)
            self.found[block] = found.joined(self.found.get(block, found))
        return result


class HalfRun(_Run):
    """Runs what ``compute_in_half`` made: products summed in float32 and rounded to its half type.

    With the tokens given that float32 chose, it shows what rounding does. Left to itself, tokens whose
    scores are equal but for rounding swap at the cut of a TopK: another choice as good as the first, and
    a large difference in those tokens.

    Attributes:
        swapped: kept tokens that it would have chosen otherwise, of all runs.
        kept: tokens kept, of all runs.
    """

    def __init__(self, exported: ExportedProgram, precision: HalfPrecision = "fp16") -> None:
        super().__init__(exported)
        self._dtype = HALF_TYPES[precision]
        self.swapped = self.kept = 0
        self._given: Iterator[Tensor] | None = None

    def outputs_with(
        self, tensors: Mapping[str, Tensor], chosen: Sequence[Tensor]
    ) -> list[Tensor]:
        """The outputs where each TopK chooses what it is told, in order of execution."""
        self._given = iter(chosen)
        try:
            return self.outputs(tensors)
        finally:
            self._given = None

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.topk.default and self._given is not None:
            return self._told(super().call_function(target, args, kwargs), args[0])
        every = [a for a in args if isinstance(a, Tensor)]
        if target not in PRODUCTS or not any(a.dtype == self._dtype for a in every):
            return super().call_function(target, args, kwargs)
        wide = fx.node.map_aggregate(args, lambda value: _widened(value, self._dtype))
        kwargs = _with_stored_scale(target, args, kwargs, self._dtype)
        return super().call_function(target, wide, kwargs).to(self._dtype)

    def _told(self, own: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        assert self._given is not None
        index = next(self._given)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        self.swapped += int((~kept.gather(-1, own[1])).sum())
        self.kept += index.numel()
        return scores.gather(-1, index), index


class WideRun(_Run):
    """Runs what ``compute_in_half`` made with every half taken as float32: weights are rounded, all else is not.

    That is what an ONNX graph can be held to on a CPU, to the last digits.
    """

    def __init__(self, exported: ExportedProgram, precision: HalfPrecision = "fp16") -> None:
        super().__init__(exported)
        self._dtype = HALF_TYPES[precision]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _widened(super().placeholder(target, args, kwargs), self._dtype)

    def run_node(self, n: fx.Node) -> Any:
        value = n.meta.get("val")
        self._is_half = isinstance(value, Tensor) and value.dtype == self._dtype
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        for name in ("dtype", "out_dtype"):  # of casts and of what int8 stands for
            if kwargs.get(name) is self._dtype:
                kwargs = {**kwargs, name: torch.float32}
        if self._is_half:
            kwargs = _with_stored_scale(target, args, kwargs, self._dtype)
        return _widened(super().call_function(target, args, kwargs), self._dtype)


def graph_inputs(exported: ExportedProgram, user: Sequence[Tensor]) -> list[Any]:
    """All placeholders of an exported graph: weights and constants, then the user's tensors."""
    given = iter(user)
    found: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            found.append(next(given))
        else:
            tables: tuple[Any, ...] = (exported.state_dict, exported.constants)
            found.append(next(t[spec.target] for t in tables if spec.target in t))
    return found


def _with_stored_scale(target: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """Attention in `dtype` with the scale that its ONNX graph has: its root, as a number of that type, on both sides."""
    if target is not aten.scaled_dot_product_attention.default:
        return kwargs
    width = torch.tensor(args[0].shape[-1], dtype=dtype)
    given = kwargs.get("scale")
    scale = 1 / width.sqrt() if given is None else torch.tensor(given, dtype=dtype)
    return {**kwargs, "scale": float(scale.sqrt()) ** 2}


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == dtype:
        return value.float()
    return value


def _tensors(args: Any, kwargs: Any, node: fx.Node) -> list[Tensor]:
    """What a product reads, but the mask of attention, which is narrowed when it is cast."""
    masked = node.target is aten.scaled_dot_product_attention.default
    given = [*args[:_MASK]] if masked else [*args, *kwargs.values()]
    found: list[Tensor] = []
    for value in given:
        found += [value] if isinstance(value, Tensor) else []
        found += (
            [v for v in value if isinstance(v, Tensor)]
            if isinstance(value, (list, tuple))
            else []
        )
    return found


def _largest(value: Tensor) -> float:
    if value.numel() == 0:
        return 0.0
    largest = float(value.abs().max())
    return largest if math.isfinite(largest) else math.inf  # NaN too


def _scores(args: Any, kwargs: Any) -> float:
    """Largest product of a query and a key, which an attention that is not fused writes."""
    query, key = args[0], args[1]
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    # By Cauchy and Schwarz at most this; the products themselves would take N x N memory.
    longest = float(query.norm(dim=-1).max()) * float(key.norm(dim=-1).max())
    return longest * float(scale)
