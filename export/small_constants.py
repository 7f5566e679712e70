"""Keep additions of tiny numbers: the optimizer behind ``torch.onnx.export`` takes 1e-15 for 0.

Its rules for ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1`` compare with a tolerance (1e-8, relative 1e-5), so that
``x / (y + 1e-15)`` becomes ``x / y`` and NaN where both are 0. They look at scalars only.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten
_NEUTRAL: dict[OpOverload, float] = {
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.div.Tensor: 1.0,
}
# Wider than the optimizer's own tolerances.
NEAR = 1e-4


def keep_small_constants(graph: fx.Graph) -> int:
    """Make numbers that are almost neutral tensors of one element; return how many nodes changed.

    Before:  ``y = add(x, 1e-15)``
    After:   ``y = add(x, full([1], 1e-15))``
    """
    edits = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _NEUTRAL or len(node.args) != 2:
            continue
        source, number = node.args
        neutral = _NEUTRAL[node.target]
        if not isinstance(source, fx.Node) or not isinstance(number, float):
            continue
        value = source.meta["val"]
        if number == neutral or abs(number - neutral) > NEAR or value.ndim == 0:
            continue
        if not value.is_floating_point():
            continue
        with graph.inserting_before(node):
            full = graph.call_function(
                aten.full.default,
                ([1], number),
                {"dtype": value.dtype, "device": value.device},
            )
        with value.fake_mode:
            full.meta["val"] = torch.full([1], number, dtype=value.dtype, device=value.device)
        node.update_arg(1, full)
        edits += 1
    return edits
