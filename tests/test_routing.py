"""Routed and frozen models: bit-equal when nothing is dropped, and equal to a slow loop when it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcr_compile import routing
from diffcr_compile.passes.base import run_passes
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
from tests.conftest import CLOSE, Case, equal, flat, keeping
from tests.reference import SHAPES, slowly_routed

FOUR = list(models.DIFFUSERS)
# What may stand in an exported graph only if the dense model's export has it too.
ROUTING_ATEN = (
    "topk",
    "sort",
    "index",
    "index_put",
    "gather",
    "scatter",
    "index_select",
    "embedding",
)


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
    assert (
        frozen["embedding"] == dense["embedding"] + blocks
    )  # rows of a table, one op in torch
    assert frozen["index_put"] == blocks
    assert frozen["gather"] + frozen["scatter"] == 0


def exported_ops(module: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    graph = torch.export.export(module, (), inputs, strict=False).graph
    names = [str(n.target).split(".")[1] for n in graph.nodes if "aten" in str(n.target)]
    return Counter(name.rstrip("_") for name in names)


# ----------------------------------------------------------------------- some tokens are kept


@pytest.mark.parametrize("turn", [0, 2])
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
    ((2, 1, 8, 6), 3, 0, True), ((1, 9, 2, 3), 1, 2, True), ((2, 9, 2, 3), 1, 2, True),
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


def test_a_stream_that_lies_transposed_is_put_right_by_the_first_block() -> None:
    """Values as with a stream in order; channels of a token side by side from then on."""
    stream = torch.randn(2, 6, 10).transpose(1, 2)  # (B, N, C) in the memory of (B, C, N)
    index = torch.tensor([[4, 0, 7], [1, 9, 2]])
    processed = torch.randn(2, 3, 6)
    found = scatter_tokens(stream, index, None, processed, None, 0, 10)
    assert torch.equal(
        found, scatter_tokens(stream.contiguous(), index, None, processed, None, 0, 10)
    )
    assert not stream.is_contiguous()
    assert found.is_contiguous()
