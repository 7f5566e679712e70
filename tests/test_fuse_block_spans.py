"""Blocks that share one index: the fused graph, what ends a span, and numbers against a slow loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_compile as dcr
from diffcr_compile import routing
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import PreconditionError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.fuse_block_spans import FuseBlockSpans
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.program import Program
from tests.conftest import CLOSE, Case, equal, flat
from tests.model_parts import OwnDiT, inputs_for
from tests.reference import SHAPES, slowly_routed

MODELS = ("dit", "pixart", "sd3", "flux")


def fused(case: Case, length: int) -> Program:
    return run_passes(case.captured, [FuseBlockSpans(length), InsertTokenRouters()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [2, 3])
def test_a_routed_span_that_keeps_all_is_the_dense_model(
    cases: Callable[..., Case], name: str, length: int
) -> None:
    case = cases(name)
    program = fused(case, length)
    assert max(len(spec.members) for spec in program.blocks) == min(length, len(case.names))
    assert [m for spec in program.blocks for m in spec.members] == case.names
    assert equal(program.module(**case.inputs), case.model(**case.inputs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [2, 3])
def test_a_frozen_span_is_a_slow_loop_with_one_choice_of_tokens(
    cases: Callable[..., Case], name: str, length: int
) -> None:
    case = cases(name)
    program = fused(case, length)
    shape = SHAPES[name]
    kept = shape.num_tokens // 3
    frozen = dcr.freeze(program.module, keep_ratio=kept / shape.num_tokens)[0]
    selects = frozen.graph.find_nodes(op="call_function", target=routing.select_tokens)
    assert len(list(selects)) == len(program.blocks)
    routers = program.module.routers
    weights, leaders = {}, {}
    for spec in program.blocks:
        weights[spec.members[0]] = routers[spec.name].score.weight.detach()[0]
        leaders.update(dict.fromkeys(spec.members, spec.members[0]))
    column = dict.fromkeys(case.names, kept)
    with torch.no_grad():
        with slowly_routed(case.model, weights, column, shape, leaders=leaders):
            expected = flat(case.model(**case.inputs))
        found = flat(frozen(**case.inputs))
        dense = flat(case.model(**case.inputs))
    for one, two, three in zip(found, expected, dense, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
        assert (one - three).abs().max() > 1e-3  # routing did something


def test_what_is_left_over_stands_in_front(cases: Callable[..., Case]) -> None:
    program = fused(cases("dit"), 2)
    assert [spec.members for spec in program.blocks] == [
        ("transformer_blocks.0",),
        ("transformer_blocks.1", "transformer_blocks.2"),
    ]
    assert [spec.name for spec in program.blocks] == [
        "transformer_blocks.0",
        "transformer_blocks.1-2",
    ]


def test_length_one_changes_nothing(cases: Callable[..., Case]) -> None:
    captured = cases("dit").captured
    result = FuseBlockSpans(1)(captured)
    assert result.program is captured
    assert result.edits == 0


def test_the_program_it_was_given_stays_as_it_is(cases: Callable[..., Case]) -> None:
    captured = cases("sd3").captured
    before = str(captured.graph)
    FuseBlockSpans(2)(captured)
    assert str(captured.graph) == before


def test_a_span_shares_its_weights_with_the_model(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    mine = {p.data_ptr() for p in case.model.parameters()}
    program = fused(case, 3)
    of_blocks = [p for n, p in program.module.named_parameters() if "select" not in n]
    assert {p.data_ptr() for p in of_blocks} <= mine


def test_a_span_can_be_skipped(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    program = fused(case, 3)
    frozen = dcr.freeze(program.module, keep_ratio=0.0)[0]
    assert not frozen.graph.find_nodes(op="call_module", target=program.blocks[0].name)
    column = dict.fromkeys(case.names, 0)
    weights = dict.fromkeys(case.names, torch.zeros(1))
    with torch.no_grad(), slowly_routed(case.model, weights, column, SHAPES["dit"]):
        expected = case.model(**case.inputs)
        found = frozen(**case.inputs)
    assert equal(found, expected)


class SkipDiT(OwnDiT):
    """The first block's output is read again after the second one."""

    def __init__(self) -> None:
        super().__init__(depth=4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        first = self.blocks[0](tokens, condition)
        second = self.blocks[1](first, condition)
        third = self.blocks[2](second + first, condition)
        return self.image(self.blocks[3](third, condition))


def test_a_long_skip_ends_the_span() -> None:
    model, inputs = SkipDiT().eval(), inputs_for()
    routed = dcr.route(model, inputs, RoutingConfig(share_index=4))
    assert [spec.members for spec in routed.program.blocks] == [
        ("blocks.0",),
        ("blocks.1",),
        ("blocks.2", "blocks.3"),
    ]
    assert equal(routed(**inputs), model(**inputs))


def test_it_refuses_what_is_routed_already(cases: Callable[..., Case]) -> None:
    with pytest.raises(PreconditionError, match="CAPTURED"):
        FuseBlockSpans(2)(cases("dit").routed)


def test_it_refuses_an_empty_span(cases: Callable[..., Case]) -> None:
    with pytest.raises(PreconditionError, match="at least 1, got 0"):
        FuseBlockSpans(0)(cases("dit").captured)


def test_tables_that_both_blocks_read_are_gathered_once(cases: Callable[..., Case]) -> None:
    program = fused(cases("flux"), 2)
    gathers = program.graph.find_nodes(op="call_function", target=routing.gather_tokens)
    assert len(list(gathers)) == 3  # the stream, cos and sin


class ReadingBlock(nn.Module):
    """Each token reads a context by itself; nothing in front of the stream is the stream."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.query, self.feed = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, context: Tensor, condition: Tensor, stream: Tensor) -> Tensor:
        query = self.query(stream) + condition[:, None]
        read = functional.scaled_dot_product_attention(query, context, context)
        stream = stream + read
        return stream + self.feed(stream).sin()


class ReadingDiT(OwnDiT):
    """The stream is the last argument; the context is a text, the first stream, or the stream itself."""

    def __init__(self, reads: str) -> None:
        super().__init__(block=ReadingBlock, depth=2, side=4, width=16)
        self.reads = reads

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        first, condition = self.embed(x, t)
        tokens = first
        for block in self.blocks:
            context = {"text": text, "first": first, "itself": tokens}[self.reads]
            tokens = block(context=context, condition=condition, stream=tokens)
        return self.image(tokens)


@pytest.mark.parametrize("reads", ["text", "first"])
@pytest.mark.parametrize("length", [5, 16])
def test_the_stream_of_a_span_need_not_come_first(reads: str, length: int) -> None:
    """16 text tokens are as many as image tokens: the shapes cannot tell them apart."""
    model = ReadingDiT(reads).eval()
    text = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))
    inputs = inputs_for(4, text=text)
    routed = dcr.route(model, inputs, RoutingConfig(share_index=2))
    (spec,) = routed.program.blocks
    assert spec.members == ("blocks.0", "blocks.1")
    frozen = dcr.freeze(routed, keep_ratio=0.5)[0]
    weight = routed.program.module.routers[spec.name].score.weight[0]
    with torch.no_grad():
        assert equal(routed(**inputs), model(**inputs))
        first, condition = model.embed(inputs["x"], inputs["t"])
        expected = first.clone()
        for row, stream in enumerate(first):  # (N, C): one sample at a time
            kept = (stream @ weight).argsort(descending=True)[:8].sort().values
            tokens = stream[None, kept]
            context = (text if reads == "text" else first)[row : row + 1]
            for block in model.blocks:
                tokens = block(context, condition[row : row + 1], tokens)
            expected[row, kept] = tokens[0]
        torch.testing.assert_close(frozen(**inputs), model.image(expected), **CLOSE)


def test_a_block_that_reads_all_of_its_stream_begins_a_span() -> None:
    model = ReadingDiT("itself").eval()
    inputs = inputs_for(4, text=torch.zeros(2, 5, 16))
    program = dcr.route(model, inputs, RoutingConfig(share_index=2)).program
    assert [spec.members for spec in program.blocks] == [("blocks.0",), ("blocks.1",)]
