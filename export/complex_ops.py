"""What each ATen op on complex tensors is in real ones.

A handler takes the emitter, and the op's arguments by name in which a complex tensor is a
:class:`Complex`; it returns a :class:`Complex` or the node of a real tensor. Every op without a handler
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from diffcr_compile.export.real_emitter import Complex, Emitter, Part

aten = torch.ops.aten
Arguments: TypeAlias = dict[str, Any]
Handler: TypeAlias = "Callable[[Emitter, Arguments], Any]"

# Ops that only move elements, or are linear without mixing the parts: the same op does it to the tensor
# with the last axis of 2, if its arguments speak of no other axis than before.
ALONG_AXES = frozenset(
    {
        *("alias", "cat", "clone", "constant_pad_nd", "copy", "cumsum", "detach", "expand", "flip"),
        *("gather", "index", "index_put", "index_select", "lift_fresh_copy", "mean", "narrow", "neg"),
        *("permute", "positive", "repeat", "reshape", "roll", "select", "select_scatter", "slice"),
        *("slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "sum", "transpose"),
        *("unbind", "unsqueeze", "view", "_unsafe_view"),
    }
)  # fmt: skip
_GROWING = frozenset({"unsqueeze", "stack"})  # their `dim` counts the axis that they add
_FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "empty": 0.0, "empty_like": 0.0,
          "new_empty": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}  # fmt: skip
_SEQUENCES = frozenset({"split", "split_with_sizes", "unbind"})


def handler_of(name: str) -> Handler | None:
    """The handler of an op by its name without namespace and overload."""
    if name in ALONG_AXES:
        return lambda emit, given: _along_axes(name, emit, given)
    if name in _FILLS:
        return lambda emit, given: _filled(emit, _FILLS[name])
    return HANDLERS.get(name)


def is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def as_complex(emit: Emitter, value: Any) -> Complex:
    """A complex value, made from a real tensor or a number if need be."""
    if isinstance(value, Complex):
        return value
    fake = value.meta["val"] if isinstance(value, fx.Node) else emit.origin.meta["val"]
    shape = fake.shape if isinstance(value, fx.Node) else ()
    wide = fake.dtype in {torch.float64, torch.complex128}
    with emit.mode:
        like = torch.empty(
            shape, dtype=torch.complex128 if wide else torch.complex64, device=fake.device
        )
    return Complex(like, parts=parts_of(emit, value))


def parts_of(emit: Emitter, value: Any) -> tuple[Part, Part]:
    """Real and imaginary part of a complex or real tensor, or of a number; None stands for zero."""
    if isinstance(value, Complex):
        return value.parts(emit)
    if isinstance(value, complex):
        return value.real or None, value.imag or None
    return value, None


def from_parts(emit: Emitter, real: Part, imaginary: Part) -> Complex:
    """The complex tensor that the node being replaced gives."""
    like = emit.origin.meta["val"]
    return Complex(like, parts=(emit.typed(real, like), emit.typed(imaginary, like)))


# --------------------------------------------------------------------------- axes and shapes


def _along_axes(name: str, emit: Emitter, given: Arguments) -> Any:
    if _means_every_element(name, given):
        return None
    target: Any = emit.origin.target
    firsts: Any = given["tensors"] if "tensors" in given else given["self"]
    first = firsts[0] if isinstance(firsts, (list, tuple)) else firsts
    rank = (first.like if isinstance(first, Complex) else first.meta["val"]).ndim
    counted = rank + 1 if name in _GROWING else rank
    args, kwargs = [], {}
    for entry in target._schema.arguments:
        value = _adjusted(name, entry.name, given[entry.name], rank, counted)
        if entry.name in {"self", "tensors", "src", "values"}:
            value = _whole(emit, value)
        elif (name, entry.name) == ("gather", "index"):
            value = _for_both_parts(emit, value)
        if not entry.kwarg_only:
            args.append(value)
        elif isinstance(value, torch.dtype):
            kwargs[entry.name] = value.to_real() if value.is_complex else value
        elif value is not None:
            kwargs[entry.name] = value
    # the real tensor may lie in memory in another way, which a reshape does not mind
    is_view = name in {"view", "_unsafe_view"} and isinstance(args[1], list)
    made = emit(aten.reshape.default if is_view else target, *args, **kwargs)
    return made if name in _SEQUENCES else Complex(emit.origin.meta["val"], both=made)


def _means_every_element(name: str, given: Arguments) -> bool:
    """Whether the op goes over all elements in one row, in which the parts would be mixed."""
    flat = {
        "sum": "dim" not in given,
        "mean": "dim" not in given,
        "roll": not given.get("dims"),
    }
    return flat.get(name, False) or (name == "constant_pad_nd" and given["value"] != 0)


def _whole(emit: Emitter, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [as_complex(emit, item).both(emit) for item in value]
    return as_complex(emit, value).both(emit)


def _adjusted(op: str, name: str, value: Any, rank: int, counted: int) -> Any:
    """An argument that still speaks of the same axes where there is one more at the end."""
    if name in {"dim", "dim0", "dim1"} and isinstance(value, int):
        return value % max(counted, 1)
    if name in {"dim", "dims"}:
        every = op in {"sum", "mean"} and not value
        axes = list(range(rank)) if every else [axis % max(rank, 1) for axis in value]
        return [*axes, rank] if op == "permute" else axes
    if name in {"size", "shape"}:
        return [*value, 2]
    if op == "constant_pad_nd" and name == "pad":
        return [0, 0, *value]
    return [*value, 1] if op == "repeat" and name == "repeats" else value


def _for_both_parts(emit: Emitter, index: fx.Node) -> fx.Node:
    """An index with one entry per element, repeated for the imaginary parts."""
    shape = list(index.meta["val"].shape)
    return emit(
        aten.expand.default, emit(aten.unsqueeze.default, index, len(shape)), [*shape, 2]
    )


# -------------------------------------------------------------------------------- arithmetic


def _product(emit: Emitter, left: Any, right: Any, times: Callable[..., Part]) -> Complex:
    (a, b), (c, d) = parts_of(emit, left), parts_of(emit, right)
    real = emit.minus(times(a, c), times(b, d))
    return from_parts(emit, real, emit.plus(times(a, d), times(b, c)))


def _mul(emit: Emitter, given: Arguments) -> Complex:
    return _product(emit, given["self"], given["other"], emit.times)


def _matrix_product(emit: Emitter, given: Arguments) -> Complex:
    def times(left: Part, right: Part) -> Part:
        return None if left is None or right is None else emit(emit.origin.target, left, right)

    def matrix(value: Complex) -> Complex:  # a part that only broadcasts is none
        return Complex(value.like, both=value.both(emit))

    right = given["mat2"] if "mat2" in given else given["other"]
    return _product(emit, matrix(given["self"]), matrix(right), times)


def _add(emit: Emitter, given: Arguments) -> Complex:
    (a, b), (c, d) = parts_of(emit, given["self"]), _scaled(emit, given)
    return from_parts(emit, emit.plus(a, c), emit.plus(b, d))


def _sub(emit: Emitter, given: Arguments) -> Complex:
    (a, b), (c, d) = parts_of(emit, given["self"]), _scaled(emit, given)
    return from_parts(emit, emit.minus(a, c), emit.minus(b, d))


def _scaled(emit: Emitter, given: Arguments) -> tuple[Part, Part]:
    """``alpha * other``."""
    alpha = given.get("alpha", 1)
    if alpha == 1:
        return parts_of(emit, given["other"])
    (a, b), (c, d) = parts_of(emit, given["other"]), parts_of(emit, alpha)
    real = emit.minus(emit.times(a, c), emit.times(b, d))
    return real, emit.plus(emit.times(a, d), emit.times(b, c))


def _div(emit: Emitter, given: Arguments) -> Complex:
    return _quotient(emit, parts_of(emit, given["self"]), parts_of(emit, given["other"]))


def _reciprocal(emit: Emitter, given: Arguments) -> Complex:
    return _quotient(emit, (1.0, None), parts_of(emit, given["self"]))


def _quotient(emit: Emitter, left: tuple[Part, Part], right: tuple[Part, Part]) -> Complex:
    (a, b), (c, d) = left, right
    if d is None:
        return from_parts(emit, emit.over(a, c), emit.over(b, c))
    size = emit.plus(emit.times(c, c), emit.times(d, d))
    real = emit.plus(emit.times(a, c), emit.times(b, d))
    imaginary = emit.minus(emit.times(b, c), emit.times(a, d))
    return from_parts(emit, emit.over(real, size), emit.over(imaginary, size))


def _square(emit: Emitter, given: Arguments) -> Complex:
    return _product(emit, given["self"], given["self"], emit.times)


def _power(emit: Emitter, given: Arguments) -> Complex | None:
    return _square(emit, given) if given["exponent"] == 2 else None


def _conj(emit: Emitter, given: Arguments) -> Complex:
    real, imaginary = given["self"].parts(emit)
    return from_parts(emit, real, emit.negative(imaginary))


def _exp(emit: Emitter, given: Arguments) -> Complex:
    real, imaginary = given["self"].parts(emit)
    size: Part = 1.0 if real is None else _function(emit, aten.exp.default, real)
    return _turned(emit, size, 0.0 if imaginary is None else imaginary)


def _polar(emit: Emitter, given: Arguments) -> Complex:
    return _turned(emit, given["abs"], given["angle"])


def _turned(emit: Emitter, size: Part, angle: Part) -> Complex:
    cosine = _function(emit, aten.cos.default, angle)
    sine = _function(emit, aten.sin.default, angle)
    return from_parts(emit, emit.times(size, cosine), emit.times(size, sine))


def _function(emit: Emitter, target: Any, part: Part) -> Part:
    if isinstance(part, fx.Node):
        return emit(target, part)
    return float(target(torch.tensor(part, dtype=torch.float64)))


# ------------------------------------------------------------------ between real and complex


def _complex(emit: Emitter, given: Arguments) -> Complex:
    return from_parts(emit, given["real"], given["imag"])


def _view_as_complex(emit: Emitter, given: Arguments) -> Complex:
    return Complex(emit.origin.meta["val"], both=given["self"])


def _view_as_real(emit: Emitter, given: Arguments) -> fx.Node:
    both: fx.Node = given["self"].both(emit)
    return both


def _real(emit: Emitter, given: Arguments) -> Any:
    return emit.filled(given["self"].parts(emit)[0], given["self"].like)


def _imag(emit: Emitter, given: Arguments) -> Any:
    return emit.filled(given["self"].parts(emit)[1], given["self"].like)


def _abs(emit: Emitter, given: Arguments) -> Any:
    a, b = _real(emit, given), _imag(emit, given)
    squares = emit(aten.add.Tensor, emit(aten.mul.Tensor, a, a), emit(aten.mul.Tensor, b, b))
    return emit(aten.sqrt.default, squares)


def _angle(emit: Emitter, given: Arguments) -> Any:
    return emit(aten.atan2.default, _imag(emit, given), _real(emit, given))


def _converted(emit: Emitter, given: Arguments) -> Any:
    """``to``: between complex types, from a real tensor, or to one (which loses the imaginary part)."""
    value, expected = given["self"], emit.origin.meta["val"]
    if expected.is_complex():
        return from_parts(emit, *parts_of(emit, value))
    real = emit.filled(value.parts(emit)[0], value.like)
    if real.meta["val"].dtype != expected.dtype:
        real = emit(aten._to_copy.default, real, dtype=expected.dtype)
    return real


# ------------------------------------------------------------------------ filling and choosing


def _filled(emit: Emitter, value: Any) -> Complex:
    return from_parts(emit, *parts_of(emit, value))


def _full(emit: Emitter, given: Arguments) -> Complex:
    return _filled(emit, given.get("fill_value", given.get("value", given.get("s"))))


def _where(emit: Emitter, given: Arguments) -> Complex:
    condition = emit(aten.unsqueeze.default, given["condition"], -1)
    kept, other = (as_complex(emit, given[name]).both(emit) for name in ("self", "other"))
    return _chosen(emit, condition, kept, other)


def _masked_fill(emit: Emitter, given: Arguments) -> Complex:
    mask = emit(aten.unsqueeze.default, given["mask"], -1)
    kept, value = (as_complex(emit, given[name]).both(emit) for name in ("self", "value"))
    return _chosen(emit, mask, value, kept)


def _chosen(emit: Emitter, condition: fx.Node, kept: fx.Node, other: fx.Node) -> Complex:
    made = emit(aten.where.self, condition, kept, other)
    return Complex(emit.origin.meta["val"], both=made)


HANDLERS: dict[str, Handler] = {
    "_conj": _conj, "_conj_physical": _conj, "conj": _conj, "conj_physical": _conj,
    "_to_copy": _converted, "to": _converted, "resolve_conj": _converted, "abs": _abs, "add": _add,
    "angle": _angle, "bmm": _matrix_product, "complex": _complex, "div": _div, "exp": _exp,
    "fill": _full, "full": _full, "full_like": _full, "imag": _imag, "masked_fill": _masked_fill,
    "matmul": _matrix_product, "mm": _matrix_product, "mul": _mul, "new_full": _full,
    "polar": _polar, "pow": _power, "real": _real, "reciprocal": _reciprocal,
    "scalar_tensor": _full, "square": _square, "sub": _sub, "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real, "where": _where,
}  # fmt: skip
