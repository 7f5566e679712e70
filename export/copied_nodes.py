"""Nodes of an ONNX graph that are equal but for what they read, and copies that read something else."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

Values = dict[ir.Value, ir.Value]


def like_nodes(first: Sequence[ir.Node], second: Sequence[ir.Node], known: Values) -> bool:
    """Whether two lists of nodes do the same, one after the other, to corresponding values.

    Args:
        first: nodes.
        second: others.
        known: values from outside that `first` reads -> what `second` reads in their place. What is not in it must
            be the same value, or a constant of equal content.
    """
    values = dict(known)
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.op_identifier() != b.op_identifier() or not _same_attributes(a, b):
            return False
        if len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs):
            return False
        for x, y in zip(a.inputs, b.inputs, strict=True):
            found = x if x is None else values.get(x, x)
            if found is not y:
                return False
        values.update(zip(a.outputs, b.outputs, strict=True))
    return True


class Copying:
    """Copies nodes.

    Args:
        values: what is read in the place of other values; what copies make is added.
        names: names of modules and of lines in the metadata of nodes -> those in the copies.
        suffix: of the names of copies and of what they make.
    """

    def __init__(self, values: Values, names: Mapping[str, str], suffix: str) -> None:
        self.values = values
        self._names = names
        self._suffix = suffix
        # "K" of the unit that is copied, as it stands in shapes -> that of the copy.
        self._sizes = dict(size for pair in values.items() for size in _sizes(*pair))
        words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self._known = re.compile(rf"(?<![\w.])(?:{words})(?!\w)")

    def copy(self, node: ir.Node) -> ir.Node:
        """The copy, not in a graph yet."""
        made = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else self.values.get(v, v) for v in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            version=node.version,
            num_outputs=len(node.outputs),
            name=f"{node.name}{self._suffix}",
            metadata_props={k: self._renamed(v) for k, v in node.metadata_props.items()},
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name = f"{old.name}{self._suffix}"
            new.type = copy.copy(old.type)
            new.shape = None if old.shape is None else self._shape(old.shape)
            self.values[old] = new
        return made

    def _renamed(self, text: str) -> str:
        return self._known.sub(lambda found: self._names[found[0]], text)

    def _shape(self, shape: ir.Shape) -> ir.Shape:
        return ir.Shape([d if isinstance(d, int) else self._dim(d) for d in shape])

    def _dim(self, dim: ir.SymbolicDim) -> ir.SymbolicDim:
        if dim.value is None:
            return dim
        return ir.SymbolicDim(
            re.sub(
                r"[A-Za-z_]\w*", lambda found: self._sizes.get(found[0], found[0]), dim.value
            )
        )


def _sizes(one: ir.Value, two: ir.Value) -> list[tuple[str, str]]:
    """Open sizes of a value, with those of another in its place."""
    if one.shape is None or two.shape is None:
        return []
    pairs = zip(one.shape, two.shape, strict=False)
    return [
        (a.value, b.value)
        for a, b in pairs
        if isinstance(a, ir.SymbolicDim)
        and isinstance(b, ir.SymbolicDim)
        and a.value
        and b.value
    ]


def _same_attributes(one: ir.Node, two: ir.Node) -> bool:
    pairs = itertools.zip_longest(one.attributes.values(), two.attributes.values())
    return all(a is not None and b is not None and _same_attribute(a, b) for a, b in pairs)


def _same_attribute(one: ir.Attr, two: ir.Attr) -> bool:
    if (one.name, one.type) != (two.name, two.type):
        return False
    if one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False  # a graph inside would have to be copied too
    if one.type == ir.AttributeType.TENSOR:
        a, b = one.as_tensor(), two.as_tensor()
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return bool(one.value == two.value)
