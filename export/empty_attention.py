"""Attention over no keys: torch gives zeros, ONNX has no graph for it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def drop_empty_attention(graph: fx.Graph) -> int:
    """Replace attention over zero keys by zeros, in place; return how many nodes changed.

    Before:  ``y = scaled_dot_product_attention(q (B, H, N, D), k (B, H, 0, D), v (B, H, 0, E))``
    After:   ``y = zeros(B, H, N, E)``
    """
    edits = 0
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        result: Tensor = node.meta["val"]
        keys = node.args[1].meta["val"]
        if keys.shape[-2] or not result.numel():
            continue
        node.target, node.args = aten.zeros.default, (list(result.shape),)
        node.kwargs = {"dtype": result.dtype, "device": result.device}
        edits += 1
    if edits:
        graph.eliminate_dead_code()
    return edits
