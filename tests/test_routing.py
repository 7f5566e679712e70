"""Routed and frozen models: bit-equal when nothing is dropped, and equal to a slow loop when it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile import routing
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.passes.remove_full_blocks import has_routing
from diffcr_compile.program import Program
from diffcr_compile.routing import (
    RandomRouter,
    TokenSelector,
    gather_tokens,
    scatter_tokens,
    select_tokens,
)
from tests import models
from tests.conftest import Case, keeping
from tests.reference import SHAPES, slowly_routed

FOUR = list(models.DIFFUSERS)
# The graph runs the batch at once and in another token order (best first, not by position) than
# the slow loop, so sums are taken in another order: fp32 rounding, not a tolerance for mistakes.
# A single wrong token would be off by 0.1 and more.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# What may stand in an exported graph only if the dense model's export has it too.
ROUTING_ATEN = ("topk", "sort", "index", "index_put", "gather", "scatter", "index_select")


def flat(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def all_kept(case: Case) -> dict[str, int]:
    return {spec.name: spec.num_tokens for spec in case.routed.blocks}


def mixed(case: Case, turn: int) -> dict[str, int]:
    """K in {1, 5, N // 2, N - 1}, another one for each block."""
    return {
        spec.name: (1, 5, spec.num_tokens // 2, spec.num_tokens - 1)[(number + turn) % 4]
        for number, spec in enumerate(case.routed.blocks)
    }


# ------------------------------------------------------------------------ all tokens are kept


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FOUR)
def test_routed_with_all_tokens_is_the_dense_model(
    name: str, training: bool, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    with torch.no_grad():
        dense = case.model(**case.inputs)
        with keeping(case, {}, training=training):
            assert equal(case.routed.module(**case.inputs), dense)
            one = models.one_sample(case.inputs, 1)
            assert equal(case.routed.module(**one), case.model(**one))


@pytest.mark.parametrize("name", ["joint", "masked", "rotary", "flexible_table", "nested"])
def test_own_models_routed_with_all_tokens_are_dense(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    with torch.no_grad():
        dense = case.model(**case.inputs)
        for training in (False, True):
            with keeping(case, {}, training=training):
                assert equal(case.routed.module(**case.inputs), dense)


@pytest.mark.parametrize("name", FOUR)
def test_frozen_with_all_tokens_has_no_routing_left(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    frozen = case.frozen(all_kept(case))
    assert not has_routing(frozen)
    assert frozen.module.routers == {}
    assert not any("select" in n or "router" in n for n, _ in frozen.module.named_modules())
    before = [(n.op, str(n.target)) for n in case.captured.graph.nodes]
    assert [(n.op, str(n.target)) for n in frozen.graph.nodes] == before
    with torch.no_grad():
        assert equal(frozen.module(**case.inputs), case.model(**case.inputs))


@pytest.mark.parametrize("name", FOUR)
def test_the_export_of_frozen_with_all_tokens_is_that_of_the_dense_model(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    frozen = exported_ops(case.frozen(all_kept(case)).module, case.inputs)
    dense = exported_ops(case.model, case.inputs)
    for op in ROUTING_ATEN:
        assert frozen[op] == dense[op], op


def test_the_export_of_a_routed_frozen_graph_has_one_topk_per_block(
    cases: Callable[..., Case],
) -> None:
    """The check above looks at the right names: here they are found."""
    case = cases("dit")
    frozen = exported_ops(case.frozen(dict.fromkeys(case.names, 16)).module, case.inputs)
    dense = exported_ops(case.model, case.inputs)
    blocks = len(case.names)
    assert frozen["topk"] == blocks
    assert frozen["index"] == dense["index"] + blocks
    assert frozen["index_put"] == blocks
    assert frozen["gather"] + frozen["scatter"] == 0


def exported_ops(module: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    graph = torch.export.export(module, (), inputs, strict=False).graph
    names = [str(n.target).split(".")[1] for n in graph.nodes if "aten" in str(n.target)]
    return Counter(name.rstrip("_") for name in names)


# ----------------------------------------------------------------------- some tokens are kept


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("name", FOUR)
def test_frozen_equals_the_slow_loop(name: str, turn: int, cases: Callable[..., Case]) -> None:
    case = cases(name)
    column = mixed(case, turn)
    frozen = case.frozen(column)
    with torch.no_grad():
        with slowly_routed(case.model, case.router_weights(), column, SHAPES[name]):
            expected = flat(case.model(**case.inputs))
        found = flat(frozen.module(**case.inputs))
        dense = flat(case.model(**case.inputs))
    for a, b, d in zip(found, expected, dense, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        # the comparison has teeth: dropping tokens moves the output a hundred times further
        assert (b - d).abs().max() > 100 * (a - b).abs().max()


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3"])
def test_frozen_without_a_block_equals_the_slow_loop(
    name: str, cases: Callable[..., Case]
) -> None:
    """K = 0 where a block may be skipped; SD3's slow loop drops a block that ends in (None, x)."""
    case = cases(name)
    column = {s.name: 0 if s.removable else 7 for s in case.routed.blocks}
    frozen = case.frozen(column)
    skipped = [name for name, kept in column.items() if kept == 0]
    assert skipped
    assert not any(n.target in skipped for n in frozen.graph.nodes)
    weights = case.router_weights()
    with torch.no_grad():
        with slowly_routed(case.model, weights, column, SHAPES[name]):
            if name == "sd3":
                for block in skipped:
                    run = case.model.get_submodule(block)
                    run.forward = lambda *_, hidden_states, **__: (None, hidden_states)
            expected = flat(case.model(**case.inputs))
        for a, b in zip(flat(frozen.module(**case.inputs)), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", FOUR)
def test_routed_and_frozen_agree_to_the_bit(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name)
    column = mixed(case, 2)
    frozen = case.frozen(column)
    with torch.no_grad(), keeping(case, column):
        assert equal(case.routed.module(**case.inputs), frozen.module(**case.inputs))


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_frozen_runs_other_batch_sizes(name: str, cases: Callable[..., Case]) -> None:
    """FLUX is left out: its index is shared by the batch, so samples depend on each other."""
    case = cases(name)
    frozen = case.frozen(mixed(case, 0))
    with torch.no_grad():
        both = flat(frozen.module(**case.inputs))
        for sample in (0, 1):
            alone = flat(frozen.module(**models.one_sample(case.inputs, sample)))
            for a, b in zip(alone, both, strict=True):
                torch.testing.assert_close(a[0], b[sample], **CLOSE)


@pytest.mark.parametrize("name", [*FOUR, "joint"])
def test_bypassed_tokens_leave_every_block_bit_equal(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    frozen = case.frozen(mixed(case, 1))
    seen = 0
    for spec, stream, index, out in scatters(frozen, case.inputs):
        first, last = spec.stream.start, spec.stream.start + spec.num_tokens
        before, after = stream[:, first:last], out[:, first:last]
        for sample in range(len(stream)):
            bypassed = sorted(set(range(spec.num_tokens)) - set(index[sample].tolist()))
            assert len(bypassed) == spec.num_tokens - index.shape[1]
            assert torch.equal(before[sample, bypassed], after[sample, bypassed])
            kept = index[sample]
            assert not torch.equal(before[sample, kept], after[sample, kept])
        seen += 1
    assert seen == len(case.names)


def scatters(
    program: Program, inputs: dict[str, Any]
) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
    """(spec, stream, index, output) of every scatter while the graph runs."""

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is scatter_tokens:
                args, _ = self.fetch_args_kwargs_from_env(n)
                found.append((args[0].clone(), args[1], value))
            return value

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        tensors = program.signature.tensors((), inputs)
        Recorder(program.module).run(*tensors.values())
    return ((spec, *record) for spec, record in zip(program.blocks, found, strict=True))


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_paper_gate_equals_the_slow_loop(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name, "paper")
    for column in (mixed(case, 2), all_kept(case)):
        frozen = case.frozen(column)
        with torch.no_grad():
            weights = case.router_weights()
            with slowly_routed(case.model, weights, column, SHAPES[name], "paper"):
                expected = flat(case.model(**case.inputs))
            for a, b in zip(flat(frozen.module(**case.inputs)), expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
            with keeping(case, column):
                assert equal(case.routed.module(**case.inputs), frozen.module(**case.inputs))


def test_a_random_router_keeps_other_tokens_each_time(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    routed = run_passes(case.captured, [InsertTokenRouters(router="random")])
    assert all(isinstance(r, RandomRouter) for r in routed.module.routers.values())
    with torch.no_grad():
        assert equal(routed.module(**case.inputs), case.model(**case.inputs))
        for module in routed.module.modules():
            if isinstance(module, TokenSelector):
                module.keep(9)
        torch.manual_seed(0)
        first, second = (routed.module(**case.inputs) for _ in range(2))
        torch.manual_seed(0)
        again = routed.module(**case.inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_straight_through_changes_no_value_and_reaches_the_routers(
    name: str, share: float, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    column = {spec.name: int(share * spec.num_tokens) for spec in case.routed.blocks}
    with keeping(case, column, training=False), torch.no_grad():
        expected = case.routed.module(**case.inputs)
    with keeping(case, column, training=True):
        found = case.routed.module(**case.inputs)
        assert equal(found, expected)
        flat(found)[0].square().sum().backward()
        for block in case.names:
            gradient = case.routed.module.routers[block].score.weight.grad
            assert gradient is not None
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0


def test_no_gate_and_no_gradient_outside_training(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    with keeping(case, dict.fromkeys(case.names, 9)):
        case.routed.module(**case.inputs).sum().backward()
        routers = case.routed.module.routers.values()
        assert all(r.score.weight.grad is None for r in routers)


def test_the_straight_through_gradient_is_that_of_the_score(
    cases: Callable[..., Case],
) -> None:
    """d out / d w = sum over kept tokens of <upstream, y - x> * sigmoid'(s) * x, by hand."""
    case = cases("one_block")
    x, weight = case.inputs["x"], case.router_weights()["blocks.0"]
    with keeping(case, {"blocks.0": 3}, training=True):
        upstream = models.randn(2, 6, 8, seed=5)
        (case.routed.module(**case.inputs) * upstream).sum().backward()
        found = case.routed.module.routers["blocks.0"].score.weight.grad[0].clone()
    expected = torch.zeros(8)
    for sample in range(2):
        score = x[sample] @ weight
        kept = score.argsort(descending=True)[:3]
        with torch.no_grad():
            condition = case.inputs["condition"][sample : sample + 1]
            y = case.model.blocks[0](x[sample : sample + 1, kept], condition)[0]
        for row, token in enumerate(kept.tolist()):
            s = score[token].sigmoid()
            residual = (upstream[sample, token] * (y[row] - x[sample, token])).sum()
            expected += residual * s * (1 - s) * x[sample, token]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def one_block_by_hand(case: Case, weights: Callable[[Tensor], Tensor], kept: int) -> Tensor:
    """The one block, with the residual of the kept tokens (best first) times `weights(score)`."""
    x, condition = case.inputs["x"], case.inputs["condition"]
    router = case.router_weights()["blocks.0"]
    out = x.clone()
    with torch.no_grad():
        for sample in range(len(x)):
            score = x[sample] @ router
            best = score.argsort(descending=True)[:kept]
            chosen = x[sample : sample + 1, best]
            y = case.model.blocks[0](chosen, condition[sample : sample + 1])[0]
            out[sample, best] = chosen[0] + weights(score[best])[:, None] * (y - chosen[0])
    return out


def test_the_paper_gate_by_hand(cases: Callable[..., Case]) -> None:
    case = cases("one_block", "paper")
    for kept in (4, 6):
        expected = one_block_by_hand(case, torch.sigmoid, kept)
        for training in (False, True):
            with keeping(case, {"blocks.0": kept}, training=training):
                found = case.routed.module(**case.inputs).detach()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------- learning the keep ratio


@pytest.mark.parametrize("gate", ["straight_through", "paper"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_boundary_tokens_count_with_their_weight(
    weight: float, gate: routing.Gate, cases: Callable[..., Case]
) -> None:
    case = cases("one_block", gate)

    def weights(score: Tensor) -> Tensor:
        rank = torch.where(torch.arange(5) >= 2, weight, 1.0)
        return rank * score.sigmoid() if gate == "paper" else rank

    expected = one_block_by_hand(case, weights, 5)
    for training in (False, True):
        with keeping(case, {}, training=training):
            case.selector("blocks.0").keep_between(2, 5, torch.tensor(weight), two_bin=False)
            found = case.routed.module(**case.inputs).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("two_bin", [False, True])
def test_the_gradient_of_the_weight_is_a_finite_difference(
    two_bin: bool, cases: Callable[..., Case]
) -> None:
    """The output is linear in the weight, so the difference of 0 and 1 is the gradient."""
    case = cases("one_block")
    program = run_passes(case.routed, [BlendTwoBins()]) if two_bin else case.routed
    upstream = models.randn(2, 6, 8, seed=5)

    def loss(weight: Tensor) -> Tensor:
        case.selector("blocks.0").keep_between(2, 5, weight, two_bin=two_bin)
        return (program.module(**case.inputs) * upstream).sum()

    with keeping(case, {}, training=True):
        weight = torch.tensor(0.4, requires_grad=True)
        value = loss(weight)
        value.backward()
        low, high = loss(torch.tensor(0.0)), loss(torch.tensor(1.0))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, high - low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value, low + 0.4 * (high - low), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_boundary_may_reach_the_top_bin(all_tokens: bool, cases: Callable[..., Case]) -> None:
    """The larger bin may be all tokens: weight 1 is then the dense model but for rounding."""
    case = cases("dit")
    high = 64 if all_tokens else 48
    with torch.no_grad(), keeping(case, dict.fromkeys(case.names, high)):
        expected = flat(case.routed.module(**case.inputs))[0]
        for block in case.names:
            case.selector(block).keep_between(32, high, torch.tensor(1.0), two_bin=False)
        found = flat(case.routed.module(**case.inputs))[0]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "gate"),
    [(n, "straight_through") for n in ("dit", "sd3", "flux", "joint")]
    + [(n, "paper") for n in ("dit", "flux")],
)
def test_two_bins_at_their_ends_are_the_single_bins(
    name: str, gate: routing.Gate, cases: Callable[..., Case]
) -> None:
    case = cases(name, gate)
    program = run_passes(case.routed, [BlendTwoBins()])
    tokens = case.routed.blocks[0].num_tokens
    low, high = tokens // 3, 2 * tokens // 3
    with torch.no_grad():
        for weight, single in ((0.0, low), (1.0, high)):
            with keeping(case, dict.fromkeys(case.names, single)):
                expected = case.routed.module(**case.inputs)
            with keeping(case, {}):
                for block in case.names:
                    selector = case.selector(block)
                    selector.keep_between(low, high, torch.tensor(weight), two_bin=True)
                found = program.module(**case.inputs)
            for a, b in zip(flat(found), flat(expected), strict=True):
                torch.testing.assert_close(a, b, **CLOSE)


def test_two_bins_with_a_fixed_k_are_that_k(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    program = run_passes(case.routed, [BlendTwoBins()])
    with torch.no_grad(), keeping(case, dict.fromkeys(case.names, 20)):
        found = program.module(**case.inputs)
        assert equal(found, case.routed.module(**case.inputs))


def test_two_bins_blend_two_runs_of_a_block(cases: Callable[..., Case]) -> None:
    case = cases("one_block")
    program = run_passes(case.routed, [BlendTwoBins()])
    low = one_block_by_hand(case, torch.ones_like, 2)
    high = one_block_by_hand(case, torch.ones_like, 5)
    for training in (False, True):
        with keeping(case, {}, training=training):
            case.selector("blocks.0").keep_between(2, 5, torch.tensor(0.3), two_bin=True)
            found = program.module(**case.inputs).detach()
        torch.testing.assert_close(found, low + 0.3 * (high - low), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- single ops


def test_select_tokens_keeps_the_highest_best_first() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0, 2.0], [5.0, 0.0, 6.0, 1.0]])
    assert select_tokens(logits, 2, shares_index=False).tolist() == [[1, 3], [2, 0]]
    # means: 2.55, 1.5, 2.5, 1.5
    assert select_tokens(logits, 2, shares_index=True).tolist() == [[0, 2], [0, 2]]


@pytest.mark.parametrize(("shape", "axis", "start", "batched"), [
    ((2, 6, 3), 1, 0, True), ((2, 9, 3), 1, 2, True), ((2, 4, 6), 2, 0, True),
    ((1, 6, 3), 1, 0, True), ((6, 3), 0, 0, False), ((9, 3), 0, 2, False), ((1, 6, 3), 1, 0, False),
    ((2, 9, 3), 1, 2, False), ((6, 3), 0, 0, True), ((9, 3), 0, 3, True), ((2, 6), 1, 0, True),
    ((2, 1, 8, 6), 3, 0, True),
])  # fmt: skip
def test_gather_tokens_against_a_slow_loop(
    shape: tuple[int, ...], axis: int, start: int, batched: bool
) -> None:
    tensor = models.randn(*shape)
    index = torch.tensor([[4, 1, 3], [0, 5, 2]] if batched else [[4, 1, 3]] * 2)
    found = gather_tokens(tensor, index, axis, start, 6, batched)
    if not batched:
        assert torch.equal(found, _rows(tensor, axis, start, index[0]))
        return
    own = tensor if axis else tensor[None]
    own = own.expand(2, *own.shape[1:])
    cut = [_rows(own[b], max(axis, 1) - 1, start, index[b]) for b in range(2)]
    assert torch.equal(found, torch.stack(cut))
    assert gather_tokens(tensor, None, axis, start, 6, batched) is tensor


def _rows(tensor: Tensor, axis: int, start: int, index: Tensor) -> Tensor:
    """The neighbours and the tokens of `index`, one by one."""
    length = tensor.shape[axis]
    wanted = [*range(start), *(start + index).tolist(), *range(start + 6, length)]
    return torch.stack([tensor.select(axis, i) for i in wanted], dim=axis)


@pytest.mark.parametrize("start", [0, 2, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_scatter_tokens_against_a_slow_loop(start: int, gated: bool) -> None:
    """9 rows, 6 of them image tokens; 3 kept."""
    stream, index = models.randn(2, 9, 4), torch.tensor([[4, 1, 3], [0, 5, 2]])
    kept = gather_tokens(stream, index, 1, start, 6, batched=True)
    processed = models.randn(2, 6, 4, seed=1)
    gate = models.randn(2, 3, seed=2) if gated else None
    found = scatter_tokens(stream, index, kept, processed, gate, start, 6)
    expected = stream.clone()
    for b in range(2):
        expected[b, :start] = processed[b, :start]
        expected[b, start + 6 :] = processed[b, start + 3 :]
        for row in range(3):
            old, new = kept[b, start + row], processed[b, start + row]
            weight = 1.0 if gate is None else 1 + gate[b, row]
            expected[b, start + index[b, row]] = old + weight * (new - old)
    torch.testing.assert_close(found, expected)


def test_a_gate_of_zero_keeps_every_bit() -> None:
    stream, processed = models.randn(2, 6, 4), models.randn(2, 6, 4, seed=1)
    found = scatter_tokens(stream, None, stream, processed, torch.zeros(2, 6), 0, 6)
    assert torch.equal(found, processed)


def test_the_router_scores_in_fp32() -> None:
    router = routing.TokenRouter(4)
    logits = router(models.randn(2, 6, 4).to(torch.bfloat16))
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 6)
