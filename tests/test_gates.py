"""Gates and the learning of keep ratios: values by hand, gradients by hand and by difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffcr_compile import routing
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from tests import models
from tests.conftest import CLOSE, Case, equal, flat, keeping

FOUR = list(models.DIFFUSERS)


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
