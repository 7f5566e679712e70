"""Each pass: golden graph, purity, contract, refusals, and numbers over drawn kept counts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.errors import PreconditionError
from diffcr_compile.passes.base import Pass, PassResult, run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks, has_routing
from diffcr_compile.program import Program, Stage, run_flat
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from tests import models
from tests.conftest import Case, keeping, make_case

# The text of torch.fx, with the number of users taken out.
ROUTED = """
graph():
    %x = placeholder[target=x]
    %condition = placeholder[target=condition]
    %blocks_0_select = call_module[target=blocks_0_select](args = (%x,), kwargs = {})
    %blocks_0_selected = call_function[target=operator.getitem](args = (%blocks_0_select, 0), kwargs = {})
    %blocks_0_gate = call_function[target=operator.getitem](args = (%blocks_0_select, 1), kwargs = {})
    %blocks_0_kept = call_function[target=diffcr_compile.routing.gather_tokens](args = (%x, %blocks_0_selected, 1, 0, 6, True), kwargs = {})
    %blocks_0 = call_module[target=blocks.0](args = (%blocks_0_kept, %condition), kwargs = {})
    %blocks_0_scatter = call_function[target=diffcr_compile.routing.scatter_tokens](args = (%x, %blocks_0_selected, %blocks_0_kept, %blocks_0, %blocks_0_gate, 0, 6), kwargs = {})
    return [blocks_0_scatter]
"""
FROZEN = """
graph():
    %x = placeholder[target=x]
    %condition = placeholder[target=condition]
    %image_tokens = call_function[target=diffcr_compile.routing.image_tokens](args = (%x, 0, 6), kwargs = {})
    %blocks_0_logits = call_module[target=blocks_0_router](args = (%image_tokens,), kwargs = {})
    %blocks_0_index = call_function[target=diffcr_compile.routing.select_tokens](args = (%blocks_0_logits, 3, False), kwargs = {})
    %blocks_0_kept = call_function[target=diffcr_compile.routing.gather_tokens](args = (%x, %blocks_0_index, 1, 0, 6, True), kwargs = {})
    %blocks_0 = call_module[target=blocks.0](args = (%blocks_0_kept, %condition), kwargs = {})
    %blocks_0_scatter = call_function[target=diffcr_compile.routing.scatter_tokens](args = (%x, %blocks_0_index, %blocks_0_kept, %blocks_0, None, 0, 6), kwargs = {})
    return [blocks_0_scatter]
"""
DENSE = """
graph():
    %x = placeholder[target=x]
    %condition = placeholder[target=condition]
    %blocks_0 = call_module[target=blocks.0](args = (%x, %condition), kwargs = {})
    return [blocks_0]
"""
SKIPPED = """
graph():
    %x = placeholder[target=x]
    %condition = placeholder[target=condition]
    return [x]
"""


def text(program: Program) -> str:
    lines = str(program.graph).splitlines()
    return "\n".join(line.split(" : ")[0] + " = " + line.split(" = ", 1)[1]
                     if " : [num_users" in line else line for line in lines)  # fmt: skip


def only_frozen(case: Case, column: dict[str, int]) -> Program:
    return FreezeKeptTokens(case.schedule(column), 0)(case.routed).program


# ------------------------------------------------------------------------------------- golden


def test_golden_graphs_of_one_block(cases: Callable[..., Case]) -> None:
    case = cases("one_block")
    assert text(case.captured) == DENSE.strip()
    assert text(case.routed) == ROUTED.strip()
    assert text(only_frozen(case, {"blocks.0": 3})) == FROZEN.strip()
    assert text(case.frozen({"blocks.0": 3})) == FROZEN.strip()
    assert text(case.frozen({"blocks.0": 6})) == DENSE.strip()
    assert text(case.frozen({"blocks.0": 0})) == SKIPPED.strip()


def test_tables_are_gathered_and_text_streams_are_left_alone(
    cases: Callable[..., Case],
) -> None:
    case = cases("flux")
    gathers = case.routed.graph.find_nodes(op="call_function", target=routing.gather_tokens)
    assert [n.args[2:] for n in gathers] == [
        (1, 0, 36, True), (0, 11, 36, False), (0, 11, 36, False),
    ] * 2  # fmt: skip
    selects = case.frozen(dict.fromkeys(case.names, 9)).graph.find_nodes(
        op="call_function", target=routing.select_tokens
    )
    assert [n.args[1:] for n in selects] == [(9, True)] * 2


def test_two_bins_call_every_block_twice(cases: Callable[..., Case]) -> None:
    for name in ("dit", "flux", "nested"):
        case = cases(name)
        result = BlendTwoBins()(case.routed)
        assert result.edits == len(case.names)
        for block in case.names:
            nodes = result.program.graph.find_nodes(op="call_module", target=block)
            assert len(list(nodes)) == 2
    # nested: text and image streams are both blended
    blends = result.program.graph.find_nodes(op="call_function", target=routing.blend_bins)
    assert len(list(blends)) == 4


# ------------------------------------------------------------------------------------- purity


def steps(case: Case) -> list[tuple[Pass, Program, int]]:
    """Every pass with a program for it and the edits that it must make."""
    names = case.names
    schedule = case.schedule({n: (0 if i == 0 else 7) for i, n in enumerate(names)})
    full = case.schedule({s.name: s.num_tokens for s in case.routed.blocks})
    kept = FreezeKeptTokens(full, 0)(case.routed).program
    return [
        (InsertTokenRouters(), case.captured, len(names)),
        (BlendTwoBins(), case.routed, len(names)),
        (FreezeKeptTokens(schedule, 0), case.routed, len(names)),
        (RemoveFullBlocks(), kept, len(names)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_pass_leaves_its_input_alone(which: int, cases: Callable[..., Case]) -> None:
    case = cases("dit")
    pass_, program, edits = steps(case)[which]
    before = str(program.graph), program.module.code, sorted(program.module.state_dict())
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    with torch.no_grad():
        output = run_flat(program, program.example)[0]
        result = pass_(program)
        assert result.edits == edits
        assert result.program is not program
        assert result.program.module is not program.module
        assert before == (
            str(program.graph), program.module.code, sorted(program.module.state_dict()),
        )  # fmt: skip
        for name, value in fields.items():
            assert getattr(program, name) is value
        assert program.module.program is program
        assert torch.equal(run_flat(program, program.example)[0], output)
    own = dict(program.module.named_parameters())
    shared = {n: p for n, p in result.program.module.named_parameters() if n in own}
    assert shared
    assert all(p is own[n] for n, p in shared.items())


def test_the_same_pass_makes_the_same_graph_and_routers(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    first, second = (run_passes(case.captured, [InsertTokenRouters(seed=3)]) for _ in range(2))
    other = run_passes(case.captured, [InsertTokenRouters(seed=4)])
    assert text(first) == text(second)
    for name in case.names:
        weights = [p.module.routers[name].score.weight for p in (first, second, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
    both = [first.module.routers[name].score.weight for name in case.names]
    assert not torch.equal(*both)


# ----------------------------------------------------------------------------------- contract


def test_nothing_to_do_returns_the_same_object(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    program = case.frozen(dict.fromkeys(case.names, 7))
    again = RemoveFullBlocks()(program)
    assert again.edits == 0
    assert again.program is program
    full = case.frozen({s.name: s.num_tokens for s in case.routed.blocks})
    assert RemoveFullBlocks()(full) == PassResult(full, 0)


def test_a_model_without_blocks_has_nothing_to_route() -> None:
    case = make_case("no_container", models.no_container())
    assert case.routed is case.captured
    assert case.routed.stage == Stage.CAPTURED
    assert InsertTokenRouters()(case.captured).edits == 0


def test_history_names_the_passes_that_changed_something(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    column = dict(zip(case.names, (0, 7, 64), strict=True))
    assert case.routed.history == ("insert-token-routers: 3 edits",)
    assert case.frozen(column).history == (
        "insert-token-routers: 3 edits",
        "freeze-kept-tokens: 3 edits",
        "remove-full-blocks: 1 edits",
    )
    assert len(case.frozen(dict.fromkeys(case.names, 7)).history) == 2


def test_a_frozen_program_knows_its_column(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    column = dict(zip(case.names, (0, 7, 64), strict=True))
    program = case.frozen(column)
    assert program.stage == Stage.FROZEN
    assert program.bucket == 0
    assert program.schedule is not None
    assert program.schedule.column(0) == column
    assert list(program.module.routers) == [case.names[1]]
    assert program.module.routers[case.names[1]] is case.routed.module.routers[case.names[1]]


def test_each_bucket_is_its_own_column(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    schedule = TokenSchedule(
        {"blocks.0": (4, 36), "blocks.1": (9, 0)},
        {"blocks.0": 36, "blocks.1": 36},
        TimestepBuckets.even(2),
    )
    for bucket, kept in enumerate(([4, 9], [])):
        program = run_passes(
            case.routed, [FreezeKeptTokens(schedule, bucket), RemoveFullBlocks()]
        )
        nodes = program.graph.find_nodes(op="call_function", target=routing.select_tokens)
        assert [node.args[1] for node in nodes] == kept
    assert not has_routing(program)


def test_the_paper_gate_keeps_the_router_of_a_full_block(cases: Callable[..., Case]) -> None:
    case = cases("one_block", "paper")
    program = case.frozen({"blocks.0": 6})
    assert list(program.module.routers) == ["blocks.0"]
    targets = [n.target for n in program.graph.nodes]
    assert routing.paper_gate in targets
    assert routing.select_tokens not in targets
    assert routing.gather_tokens not in targets
    assert RemoveFullBlocks()(program).edits == 0


def test_passes_are_frozen_dataclasses_with_kebab_names() -> None:
    for kind in (InsertTokenRouters, FreezeKeptTokens, RemoveFullBlocks, BlendTwoBins):
        assert issubclass(kind, Pass)
        assert kind.__dataclass_params__.frozen
        words = "".join(word.capitalize() for word in kind.name.split("-"))
        assert words == kind.__name__
        assert inspect.getmodule(kind).__name__.endswith(kind.name.replace("-", "_"))


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("pass_", "stage", "message"),
    [
        (
            InsertTokenRouters(),
            "ROUTED",
            "insert-token-routers needs a CAPTURED program, got ROUTED",
        ),
        (BlendTwoBins(), "CAPTURED", "blend-two-bins needs a ROUTED program, got CAPTURED"),
        (
            RemoveFullBlocks(),
            "ROUTED",
            "remove-full-blocks needs a FROZEN program, got ROUTED",
        ),
    ],
)
def test_the_wrong_stage_is_refused(
    pass_: Pass, stage: str, message: str, cases: Callable[..., Case]
) -> None:
    case = cases("plain")
    with pytest.raises(PreconditionError, match=message):
        pass_(case.routed if stage == "ROUTED" else case.captured)


def test_freezing_needs_a_routed_program(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    freeze = FreezeKeptTokens(case.schedule(dict.fromkeys(case.names, 9)), 0)
    with pytest.raises(
        PreconditionError, match=r"got CAPTURED; run insert-token-routers first"
    ):
        freeze(case.captured)
    with pytest.raises(PreconditionError, match="needs a ROUTED program, got FROZEN"):
        freeze(case.frozen(dict.fromkeys(case.names, 9)))


@pytest.mark.parametrize("bucket", [-1, 1])
def test_a_bucket_outside_the_schedule_is_refused(
    bucket: int, cases: Callable[..., Case]
) -> None:
    case = cases("plain")
    schedule = case.schedule(dict.fromkeys(case.names, 9))
    with pytest.raises(PreconditionError, match=rf"bucket must be in \[0, 1\), got {bucket}"):
        FreezeKeptTokens(schedule, bucket)(case.routed)


def test_a_schedule_must_name_the_routed_blocks_and_no_others(
    cases: Callable[..., Case],
) -> None:
    case = cases("plain")
    with pytest.raises(PreconditionError, match=r"schedule has no entry for \['blocks.1'\]"):
        FreezeKeptTokens(case.schedule({"blocks.0": 9}), 0)(case.routed)
    tokens = dict.fromkeys([*case.names, "blocks.7"], 36)
    more = TokenSchedule(dict.fromkeys(tokens, (9,)), tokens, TimestepBuckets.even(1))
    with pytest.raises(
        PreconditionError, match=r"schedule names \['blocks.7'\], which are not"
    ):
        FreezeKeptTokens(more, 0)(case.routed)


def test_more_tokens_than_there_are_is_refused(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    tokens = dict.fromkeys(case.names, 99)
    schedule = TokenSchedule(dict.fromkeys(tokens, (37,)), tokens, TimestepBuckets.even(1))
    with pytest.raises(
        PreconditionError, match=r"blocks.0 has 36 tokens, the schedule keeps 37"
    ):
        FreezeKeptTokens(schedule, 0)(case.routed)


@pytest.mark.parametrize("name", ["flux", "joint", "nested"])
def test_a_block_with_another_stream_cannot_be_skipped(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    schedule = case.schedule(dict.fromkeys(case.names, 0))
    with pytest.raises(PreconditionError, match=r"cannot be skipped \(keep ratio 0\)"):
        FreezeKeptTokens(schedule, 0)(case.routed)


# ----------------------------------------------------------------------------------- property


@settings(max_examples=8, deadline=None)
@given(kept=st.tuples(st.integers(0, 36), st.integers(0, 36)), batch=st.integers(1, 3))
def test_any_kept_counts_freeze_to_what_the_routed_graph_computes(
    kept: tuple[int, int], batch: int
) -> None:
    case = _plain()
    column = dict(zip(case.names, kept, strict=True))
    program = case.frozen(column)
    inputs = {"x": models.randn(batch, 2, 6, 6, seed=9), "t": torch.linspace(0.1, 0.9, batch)}
    with torch.no_grad():
        found = program.module(**inputs)
        with keeping(case, {name: k for name, k in column.items() if k}):
            blocks = [case.model.get_submodule(n) for n, k in column.items() if k == 0]
            try:
                for block in blocks:
                    block.forward = lambda x, *_: x
                assert torch.equal(case.routed.module(**inputs), found)
            finally:
                for block in blocks:
                    del block.forward
    left = [n.args[1] for n in program.graph.nodes if n.target is routing.select_tokens]
    assert left == [k for k in kept if 0 < k < 36]


_CASES: dict[str, Case] = {}


def _plain() -> Case:
    """Hypothesis and function-scoped fixtures do not mix."""
    if "plain" not in _CASES:
        _CASES["plain"] = make_case("plain", models.plain())
    return _CASES["plain"]


def test_block_looks_up_a_spec(cases: Callable[..., Case]) -> None:
    spec = cases("plain").captured.block("blocks.1")
    assert isinstance(spec, BlockSpec)
    assert spec.name == "blocks.1"
