"""MACs against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffcr_compile as dcr
from diffcr_compile.errors import UsageError
from diffcr_compile.macs import flop_counter, keep_levels, measure_costs
from tests.model_parts import Block, OwnDiT, inputs_for


def dit_block_macs(kept: int, width: int) -> int:
    """One block of DiTTransformer2DModel: projections, QK and AV, feed-forward, modulation."""
    projections = 4 * width * width * kept
    attention = 2 * kept * kept * width
    feed_forward = 8 * width * width * kept
    modulation = 6 * width * width  # one vector per sample
    embedding = 256 * width + width * width  # the block's own timestep embedder
    return projections + attention + feed_forward + modulation + embedding


def test_dit_blocks_cost_what_the_formula_says(cases) -> None:
    case = cases("dit")
    width, tokens = 32, 64
    costs = measure_costs(case.captured, multiple_of=8, min_keep_ratio=0.25)
    for name in case.names:
        assert costs.levels[name] == (16, 24, 32, 40, 48, 56, 64)
        for kept, macs in zip(costs.levels[name], costs.per_level[name], strict=True):
            router = tokens * width if kept < tokens else 0
            assert macs == dit_block_macs(kept, width) + router
    assert costs.dense == costs.outer + len(case.names) * dit_block_macs(tokens, width)


def test_every_level_is_counted_even_where_the_fit_is_used(cases) -> None:
    """Levels of the quadratic fit equal levels that are too few to fit, counted one by one."""
    case = cases("flux")
    many = measure_costs(case.captured, multiple_of=2, min_keep_ratio=0.1)
    few = measure_costs(
        case.captured, multiple_of=case.findings.blocks[0].num_tokens // 2, min_keep_ratio=0.1
    )
    for name in case.names:
        for kept in few.levels[name]:
            assert many.at(name, kept) == few.at(name, kept)


def test_routed_and_captured_programs_cost_the_same(cases) -> None:
    case = cases("sd3")
    assert measure_costs(case.captured, 16, 0.25) == measure_costs(case.routed, 16, 0.25)


@pytest.mark.parametrize(
    ("tokens", "multiple", "ratio", "expected"),
    [
        (64, 16, 0.25, (16, 32, 48, 64)),
        (64, 16, 0.26, (32, 48, 64)),
        (50, 16, 0.1, (16, 32, 48, 50)),
        (8, 16, 0.1, (8,)),
    ],
)
def test_levels(tokens: int, multiple: int, ratio: float, expected: tuple[int, ...]) -> None:
    assert keep_levels(tokens, multiple, ratio) == expected


def test_a_skipped_block_costs_nothing(cases) -> None:
    case = cases("dit")
    costs = measure_costs(case.captured, 8, 0.25, skip_blocks=True)
    plain = measure_costs(case.captured, 8, 0.25)
    for name in case.names:
        assert costs.levels[name] == (0, *plain.levels[name])
        assert costs.per_level[name] == (0.0, *plain.per_level[name])
        assert costs.routing[name][0] == costs.moved_bytes[name][0] == 0.0
    assert costs.smallest_budget() == costs.outer / costs.dense


def test_a_block_with_a_text_stream_is_never_skipped(cases) -> None:
    case = cases("sd3")
    costs = measure_costs(case.captured, 16, 0.25, skip_blocks=True)
    first, last = (costs.levels[name] for name in case.names)
    assert first[0] > 0
    assert last[0] == 0  # it returns the image only, so nobody misses it


class TorchAttentionBlock(nn.Module):
    """The attention of torch itself, which is one fused op in evaluation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        given = x + condition[:, None]
        return x + self.attention(given, given, given, need_weights=False)[0]


class TorchEncoderBlock(nn.Module):
    """Attention and feed-forward of torch itself, likewise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.layer(x + condition[:, None])


@pytest.mark.parametrize(
    ("block", "feed_forward"), [(TorchAttentionBlock, 0), (TorchEncoderBlock, 8)]
)
def test_fused_layers_of_torch_cost_what_the_formula_says(
    block: type[nn.Module], feed_forward: int
) -> None:
    width, tokens = 16, 36
    model, inputs = OwnDiT(block=block, depth=1).eval(), inputs_for()

    def formula(kept: int) -> int:
        return (4 + feed_forward) * width * width * kept + 2 * kept * kept * width

    program = dcr.route(model, inputs).program
    costs = measure_costs(program, multiple_of=12, min_keep_ratio=0.25)
    (per_level,) = costs.per_level.values()
    router = tokens * width
    assert per_level == (formula(12) + router, formula(24) + router, formula(36))
    (planned,) = dcr.inspect(model, inputs).details
    assert planned.macs == formula(36)
    assert torch.backends.mha.get_fastpath_enabled()


class SixBestBlock(Block):
    """Looks at its six largest tokens: fewer are an error of torch's."""

    def mix(self, x: Tensor) -> Tensor:
        return x + x.topk(6, dim=1).values.mean(1, keepdim=True)


def test_a_block_that_needs_more_tokens_than_the_smallest_keep_ratio_is_named() -> None:
    program = dcr.route(OwnDiT(block=SixBestBlock).eval(), inputs_for()).program
    measure_costs(program, multiple_of=2, min_keep_ratio=6 / 36)
    with pytest.raises(UsageError, match=r"blocks\.0 does not run with 4 of its 36") as caught:
        measure_costs(program, multiple_of=2, min_keep_ratio=4 / 36)
    assert caught.value.code == "DCR-U080"


class Attention(nn.Module):
    """Softmax attention or linear attention, with the same layers."""

    def __init__(self, width: int, heads: int, linear: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.linear = heads, linear

    def forward(self, x: Tensor, rope: None = None, mask: None = None) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in split)
        y = q @ (k.mT @ v) if self.linear else (q @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def test_blocks_that_put_the_same_layers_together_otherwise_cost_what_each_does() -> None:
    model = OwnDiT(depth=4).eval()
    for number, block in enumerate(model.blocks):
        block.attention = Attention(model.width, 4, linear=number % 2 == 0)
    inputs = inputs_for()
    costs = measure_costs(dcr.route(model, inputs).program, 9, 0.2)
    with torch.no_grad(), flop_counter() as counter:
        model(**inputs)
    assert costs.dense == counter.get_total_flops() / 2 / len(inputs["x"])
    whole = [costs.per_level[f"blocks.{number}"][-1] for number in range(4)]
    assert whole[0] == whole[2] != whole[1] == whole[3]


def test_products_that_torch_does_not_count_are_counted() -> None:
    def macs(run: Callable[[], object]) -> float:
        with torch.no_grad(), flop_counter() as counter:
            run()
        return counter.get_total_flops() / 2

    rows, bilinear = torch.ones(8, 16), nn.Bilinear(16, 12, 4)
    assert macs(lambda: rows @ torch.ones(16)) == 8 * 16
    assert macs(lambda: bilinear(rows, torch.ones(8, 12))) == 8 * 16 * 12 * 4
    assert (
        macs(lambda: bilinear(torch.ones(2, 8, 16), torch.ones(2, 8, 12))) == 16 * 16 * 12 * 4
    )
    assert (
        macs(lambda: torch.addbmm(torch.ones(3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)))
        == 120
    )
    half, experts = torch.ones(16, 32).bfloat16(), torch.ones(2, 8, 32).bfloat16().mT
    ends = torch.tensor([8, 16], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert macs(lambda: torch._grouped_mm(half, experts, offs=ends)) == 16 * 32 * 8
