"""The verifier finds what is planted in a graph, at every stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from diffcr_compile import routing
from diffcr_compile.errors import VerificationError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.program import Program, Stage
from diffcr_compile.verify import check_static, infer_shapes, verify
from tests.conftest import Case
from tests.model_parts import Block

aten = torch.ops.aten


def edited(program: Program, edit: Callable[[fx.Graph], None], **changes: object) -> Program:
    graph = program.copy_graph()
    edit(graph)
    return program.with_graph(graph, **changes)


def node_of(graph: fx.Graph, target: object) -> fx.Node:
    return next(n for n in graph.nodes if n.target is target or n.target == target)


@pytest.fixture
def case(cases: Callable[..., Case]) -> Case:
    return cases("plain")


@pytest.fixture
def frozen(case: Case) -> Program:
    return case.frozen(dict.fromkeys(case.names, 9))


@pytest.mark.parametrize(
    "name", ["dit", "pixart", "sd3", "flux", "joint", "nested", "one_block"]
)
def test_sound_programs_of_every_stage_pass(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name)
    for program in (case.captured, case.routed, case.frozen(dict.fromkeys(case.names, 5))):
        verify(program)


def test_shapes_are_those_of_a_real_run(case: Case, frozen: Program) -> None:
    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                real[n.name] = tuple(value.shape)
            return value

    for program in (case.captured, case.routed, frozen):
        real: dict[str, tuple[int, ...]] = {}
        with torch.no_grad():
            Recorder(program.module).run(*program.example.values())
        assert infer_shapes(program) == real


def test_a_wrong_shape_is_named_with_its_node(case: Case) -> None:
    def cut(graph: fx.Graph) -> None:
        block = node_of(graph, "blocks.1")
        with graph.inserting_before(block):
            narrow = graph.call_function(aten.slice.Tensor, (block.args[1], 1, 0, 7))
        block.args = (block.args[0], narrow)

    for program in (case.captured, case.routed):
        with pytest.raises(VerificationError, match="blocks_1 cannot run: RuntimeError"):
            verify(edited(program, cut))


def test_of_passes_in_a_row_the_later_ones_run_no_block_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[torch.Size] = []
    forward = Block.forward

    def counted(self: Block, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        runs.append(x.shape)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    column = dict(zip(case.names, (9, 36), strict=True))
    steps = [FreezeKeptTokens(case.schedule(column), 0), RemoveFullBlocks()]
    run_passes(case.routed, steps)
    assert [shape[1] for shape in runs].count(9) == 1


def test_what_is_known_of_other_shapes_hides_nothing(case: Case) -> None:
    """A block that ran well is run again when a pass gives it something else."""

    def cut(graph: fx.Graph) -> None:
        block = node_of(graph, "blocks.1")
        with graph.inserting_before(block):
            narrow = graph.call_function(aten.slice.Tensor, (block.args[1], 1, 0, 7))
        block.args = (block.args[0], narrow)

    known: dict[Any, Any] = {}
    assert infer_shapes(case.captured, known) == infer_shapes(case.captured, known)
    assert known
    with pytest.raises(VerificationError, match="blocks_1 cannot run: RuntimeError"):
        verify(edited(case.captured, cut), known)


def test_a_gather_of_too_few_tokens_is_caught(frozen: Program) -> None:
    def shift(graph: fx.Graph) -> None:
        gather = node_of(graph, routing.gather_tokens)
        gather.update_arg(4, 30)  # N is 36

    with pytest.raises(
        VerificationError, match=r"blocks_0_scatter puts back \(2, 15, 16\) for kept"
    ):
        verify(edited(frozen, shift))


def test_a_scatter_that_changes_the_stream_is_caught(frozen: Program) -> None:
    """The last block's scatter: what follows it works on any number of tokens here."""

    def drop(graph: fx.Graph) -> None:
        scatter = [n for n in graph.nodes if n.target is routing.scatter_tokens][-1]
        scatter.update_arg(1, None)  # "all kept": the K processed rows become the stream
        for user in list(scatter.users):
            user.replace_input_with(scatter, scatter.args[0])

    with pytest.raises(
        VerificationError, match=r"has shape \(2, 9, 16\), its stream has \(2, 36, 16\)"
    ):
        verify(edited(frozen, drop))


def test_a_block_that_is_missing_or_called_too_often_is_caught(
    case: Case, frozen: Program
) -> None:
    def skip(graph: fx.Graph) -> None:
        block = node_of(graph, "blocks.0")
        block.replace_all_uses_with(block.args[0])
        graph.erase_node(block)

    def twice(graph: fx.Graph) -> None:
        block = node_of(graph, "blocks.0")
        with graph.inserting_after(block):
            again = graph.call_module("blocks.0", block.args)
        block.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)

    with pytest.raises(
        VerificationError, match=r"blocks.0 is called 0 times in a CAPTURED graph"
    ):
        verify(edited(case.captured, skip))
    with pytest.raises(
        VerificationError, match=r"blocks.0 is called 2 times in a CAPTURED graph"
    ):
        verify(edited(case.captured, twice))
    with pytest.raises(
        VerificationError, match=r"blocks.0 is called 2 times in a FROZEN graph"
    ):
        verify(edited(frozen, twice))


def test_a_leftover_selector_is_caught(case: Case, frozen: Program) -> None:
    unfrozen = dataclasses.replace(
        case.routed, stage=Stage.FROZEN, schedule=frozen.schedule, bucket=0
    )
    with pytest.raises(
        VerificationError, match=r"selectors whose K may change: .'blocks_0_select'"
    ):
        verify(unfrozen)


@pytest.mark.parametrize("missing", ["schedule", "bucket"])
def test_frozen_needs_schedule_and_bucket(missing: str, frozen: Program) -> None:
    with pytest.raises(VerificationError, match="needs its schedule and its bucket"):
        verify(dataclasses.replace(frozen, **{missing: None}))


def test_a_k_that_is_no_integer_is_caught(frozen: Program) -> None:
    def dynamic(graph: fx.Graph) -> None:
        select = node_of(graph, routing.select_tokens)
        with graph.inserting_before(select):
            size = graph.call_function(aten.sym_size.int, (select.args[0], 0))
        select.update_arg(1, size)

    with pytest.raises(VerificationError, match=r"K is .*, expected an int"):
        check_static(edited(frozen, dynamic))
    with pytest.raises(VerificationError):
        verify(edited(frozen, dynamic))

    def real(graph: fx.Graph) -> None:
        node_of(graph, routing.select_tokens).update_arg(1, 9.0)

    with pytest.raises(VerificationError):
        verify(edited(frozen, real))


def test_a_k_that_the_schedule_does_not_say_is_caught(frozen: Program) -> None:
    def other(graph: fx.Graph) -> None:
        node_of(graph, routing.select_tokens).update_arg(1, 10)

    with pytest.raises(
        VerificationError, match=r"blocks_0_index: K is 10, the schedule says 9"
    ):
        verify(edited(frozen, other))


def test_swapped_ks_are_caught(case: Case) -> None:
    program = case.frozen({"blocks.0": 9, "blocks.1": 12})

    def swap(graph: fx.Graph) -> None:
        first, second = (n for n in graph.nodes if n.target is routing.select_tokens)
        first.update_arg(1, 12)
        second.update_arg(1, 9)

    with pytest.raises(
        VerificationError, match=r"blocks_0_index: K is 12, the schedule says 9"
    ):
        verify(edited(program, swap))


def test_a_block_that_should_be_skipped_is_caught(case: Case) -> None:
    full = case.frozen(dict.fromkeys(case.names, 9))
    skipped = dataclasses.replace(full, schedule=case.schedule({"blocks.0": 0, "blocks.1": 9}))
    with pytest.raises(
        VerificationError, match=r"blocks_0_index: K is 9, the schedule says no such"
    ):
        verify(skipped)
