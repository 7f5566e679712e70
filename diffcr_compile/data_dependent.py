"""Shapes and branches that follow the values of tensors: a static graph has neither."""

from __future__ import annotations

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

# What a forward on fake tensors, which have shapes and no values, raises where it needs values.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def needs_values(error: BaseException) -> str:
    """What is wrong, in words, after the name of a module or a node.

    Args:
        error: one of ``DATA_DEPENDENT``.
    """
    return (
        f"its sizes or branches depend on the values of tensors ({getattr(error, 'func', error)}), "
        "which a static graph cannot have; write it with a mask over all tokens instead"
    )
