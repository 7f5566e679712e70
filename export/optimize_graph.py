"""The optimiser of torch.onnx.export without the one rule whose time grows with the square of the graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules.common import slice_split_rule

MOST_ROUNDS = 2


def rewrite_rules() -> tuple[rewriter.RewriteRule, ...]:
    """The rules that torch applies, in its order, but for two slices that become a split.

    That rule has two outputs, and to find the second its matcher walks the whole graph for every node: more than half
    of the time of an export of 28 blocks. It is about slices without steps; torch's all have steps.
    """
    rules: tuple[rewriter.RewriteRule, ...] = rewriter._DEFAULT_REWRITE_RULES
    return tuple(rule for rule in rules if rule is not slice_split_rule)


def optimize_graph(model: ir.Model) -> None:
    """Fold constants and apply :func:`rewrite_rules` in place, as ``torch.onnx.export(optimize=True)`` does.

    Its time is linear in the number of nodes.
    """
    common.InlinePass()(model)
    for _ in range(MOST_ROUNDS):
        if not _one_round(model):
            break
    for last in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)


def _one_round(model: ir.Model) -> bool:
    """Whether anything changed."""
    changed = bool(fold_constants_ir(model, onnx_shape_inference=True).modified)
    for step in (
        rewriter.RewritePass(rewrite_rules()),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        changed |= bool(step(model).modified)
    return changed
