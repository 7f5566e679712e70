"""Rewrites of an exported program that every ONNX export needs, whatever the model."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from diffcr_compile.export.bfloat16 import compute_in_float32
from diffcr_compile.export.complex_numbers import use_real_numbers
from diffcr_compile.export.constant_parts import work_out_constants
from diffcr_compile.export.empty_attention import drop_empty_attention
from diffcr_compile.export.small_constants import keep_small_constants

aten = torch.ops.aten


def lower_for_onnx(exported: ExportedProgram) -> ExportedProgram:
    """`exported` (static shapes) in a form that ONNX can express; the given program is used up."""
    exported = compute_in_float32(use_real_numbers(exported))
    work_out_constants(exported)
    drop_empty_attention(exported.graph)
    drop_false_squeezes(exported.graph)
    keep_small_constants(exported.graph)
    exported.graph.lint()
    exported.graph_module.recompile()
    return exported


def drop_false_squeezes(graph: fx.Graph) -> int:
    """Take squeezes of axes longer than 1 away; return how many nodes changed.

    Before:  ``y = squeeze(x (B, 64, C), dim=1)``     torch: nothing happens; ONNX: invalid
    After:   ``y = alias(x)``

    The node keeps its name, because an exported program refers to its outputs by name.
    """
    edits = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (
            aten.squeeze.dim,
            aten.squeeze.dims,
        ):
            continue
        source, axes = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        shape = source.meta["val"].shape
        asked = [axes] if isinstance(axes, int) else list(axes)
        real = [axis for axis in asked if shape[axis] == 1]
        if len(real) == len(asked):
            continue
        if real:
            node.target, node.args = aten.squeeze.dims, (source, real)
        else:
            node.target, node.args = aten.alias.default, (source,)
        edits += 1
    return edits
