"""Values and instructions of the pass that says complex numbers in real ones."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# A real tensor, a number, or nothing, which stands for zero.
Part: TypeAlias = "fx.Node | float | None"
# What a reader of the ONNX graph is told about a node, and the exporter passes on.
_PASSED_ON = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class Complex:
    """A complex tensor: one real tensor with a last axis of 2, or two parts; each is made when asked for.

    Args:
        like: the fake complex tensor that is replaced.
        both: (*shape, 2).
        parts: real and imaginary part; each broadcasts to the shape.
    """

    def __init__(
        self, like: Tensor, *, both: fx.Node | None = None, parts: Any = None
    ) -> None:
        self.like = like
        self._both = both
        self._parts: tuple[Part, Part] | None = parts

    def both(self, emit: Emitter) -> fx.Node:
        """(*shape, 2): real and imaginary part along the last axis."""
        if self._both is None:
            assert self._parts is not None
            whole = [emit.filled(part, self.like) for part in self._parts]
            self._both = emit(aten.stack.default, whole, -1)
        return self._both

    def parts(self, emit: Emitter) -> tuple[Part, Part]:
        """Real and imaginary part, each of the tensor's shape or one that broadcasts to it."""
        if self._parts is None:
            axis = self.like.ndim
            real = emit(aten.select.int, self._both, axis, 0)
            self._parts = (real, emit(aten.select.int, self._both, axis, 1))
        return self._parts


class Emitter:
    """Puts nodes before the one that is being replaced, with shapes inferred on fake tensors."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self.graph = graph
        self.mode = mode
        self._origin: fx.Node | None = None

    def before(self, origin: fx.Node) -> None:
        """Nodes are made in the place and in the name of `origin` from now on."""
        self._origin = origin

    @property
    def origin(self) -> fx.Node:
        """The node that is being replaced."""
        assert self._origin is not None
        return self._origin

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node that calls `target`."""
        with self.graph.inserting_before(self.origin):
            node = self.graph.call_function(target, args, kwargs)
        for key in _PASSED_ON:
            if key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def typed(self, part: Part, like: Tensor) -> Part:
        """A part in the real type of the complex tensor `like`."""
        dtype = like.dtype.to_real()
        if not isinstance(part, fx.Node) or part.meta["val"].dtype == dtype:
            return part
        return self(aten._to_copy.default, part, dtype=dtype)

    def filled(self, part: Part, like: Tensor) -> fx.Node:
        """A part as a tensor of exactly the shape and the real type of `like`."""
        part, dtype = self.typed(part, like), like.dtype.to_real()
        if not isinstance(part, fx.Node):
            value = 0.0 if part is None else part
            size = list(like.shape)
            return self(aten.full.default, size, value, dtype=dtype, device=like.device)
        if part.meta["val"].shape == like.shape:
            return part
        return self(aten.expand.default, part, list(like.shape))

    # ------------------------------------------------- arithmetic in which None stands for zero

    def times(self, left: Part, right: Part) -> Part:
        if left is None or right is None:
            return None
        if isinstance(left, fx.Node):
            return left if _is(right, 1) else self(aten.mul.Tensor, left, right)
        if isinstance(right, fx.Node):
            return self.times(right, left)
        return left * right

    def plus(self, left: Part, right: Part) -> Part:
        if left is None or right is None:
            return right if left is None else left
        if isinstance(left, fx.Node):
            return self(aten.add.Tensor, left, right)
        return self.plus(right, left) if isinstance(right, fx.Node) else left + right

    def minus(self, left: Part, right: Part) -> Part:
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            return self(aten.sub.Tensor, left, right)
        return self.plus(left, self.negative(right))

    def negative(self, part: Part) -> Part:
        if isinstance(part, fx.Node):
            return self(aten.neg.default, part)
        return None if part is None else -part

    def over(self, left: Part, right: Part) -> Part:
        """`right` is not zero."""
        if left is None or right is None:
            return None
        if isinstance(left, fx.Node):
            return self(aten.div.Tensor, left, right)
        if isinstance(right, fx.Node):
            inverse = self(aten.reciprocal.default, right)
            return self.times(inverse, left)
        return left / right


def _is(part: Part, number: float) -> bool:
    return not isinstance(part, fx.Node) and part == number
