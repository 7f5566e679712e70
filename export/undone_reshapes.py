"""Reshapes between the scatter of a block and what the next one reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def drop_undone_reshapes(model: ir.Model) -> int:
    """Let the next router and gather read the rows that a scatter wrote; return how many reshapes were passed by.

    Before:  ``rows = ScatterND(...) (B * N, C); y = Reshape(rows, (B, N, C)); z = Reshape(y, (B * N, C))``
    After:   ``z`` is ``rows``
    """
    edits = 0
    for node in model.graph:
        rows = _scattered_rows(node)
        if rows is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(rows)
            edits += 1
    if edits:
        common.RemoveUnusedNodesPass()(model)
    return edits


def _scattered_rows(node: ir.Node) -> ir.Value | None:
    """What a scatter wrote, if `node` is the second of two reshapes of it and gives its shape back."""
    stream = _reshaped(node)
    rows = None if stream is None else _reshaped(stream.producer())
    scatter = None if rows is None else rows.producer()
    if rows is None or scatter is None or scatter.op_type != "ScatterND":
        return None
    same = (
        rows.shape is not None
        and rows.shape.is_static()
        and rows.shape == node.outputs[0].shape
    )
    return rows if same else None


def _reshaped(node: ir.Node | None) -> ir.Value | None:
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None
