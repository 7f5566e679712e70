"""Which blocks may be routed: every legal model with the right roles, every illegal one refused."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

import diffcr_compile as dcr
from diffcr_compile.blocks import BlockSpec, TokenAxis
from diffcr_compile.capture import capture
from diffcr_compile.errors import CaptureError
from diffcr_compile.legality import describe, find_blocks
from diffcr_compile.recorded import Call
from diffcr_compile.residual import residual_pairs
from diffcr_compile.streams import sample_input
from diffcr_compile.trial import Trial
from tests import models
from tests.conftest import Case, keeping
from tests.model_parts import Block, OwnDiT, inputs_for

ROPE = (1, "rope")
FLUX_TABLES = (
    TokenAxis((1, "image_rotary_emb", 0), 0, 11, batched=False),
    TokenAxis((1, "image_rotary_emb", 1), 0, 11, batched=False),
)
# name -> factory, blocks found, (stream path, start, output path, aligned, shares_index, removable)
LEGAL: dict[str, tuple[Callable[[], models.Example], int, tuple[Any, ...]]] = {
    "dit": (models.tiny_dit, 3, ((0, 0), 0, (), (), False, True)),
    "pixart": (models.tiny_pixart, 2, ((0, 0), 0, (), (), False, True)),
    "sd3": (models.tiny_sd3, 2, ((1, "hidden_states"), 0, (1,), (), False, False)),
    "flux": (models.tiny_flux, 2, ((1, "hidden_states"), 0, (1,), FLUX_TABLES, True, False)),
    "plain": (models.plain, 2, ((0, 0), 0, (), (), False, True)),
    "zero gates": (models.zero_gates, 2, ((0, 0), 0, (), (), False, True)),
    "text first in one stream": (models.joint, 2, ((0, 0), 5, (), (), False, False)),
    "table (N, D)": (
        models.rotary, 2, ((0, 0), 0, (), (TokenAxis(ROPE, 0, 0, batched=False),), True, True),
    ),
    "table (N, D), heads = batch": (
        lambda: models.rotary(heads=2), 2,
        ((0, 0), 0, (), (TokenAxis(ROPE, 0, 0, batched=False),), True, True),
    ),
    "table (1, N, D) over heads": (
        lambda: models.rotary(axes="1ND"), 2,
        ((0, 0), 0, (), (TokenAxis(ROPE, 1, 0, batched=False),), True, True),
    ),
    "table (1, N, D), heads = batch": (
        lambda: models.rotary(heads=2, axes="1ND"), 2,
        ((0, 0), 0, (), (TokenAxis(ROPE, 1, 0, batched=False),), True, True),
    ),
    "table that may have a batch": (
        models.flexible_table, 2,
        ((0, 0), 0, (), (TokenAxis(ROPE, 0, 0, batched=True),), False, True),
    ),
    "mask of ones": (
        models.masked, 2, ((0, 0), 0, (), (TokenAxis((1, "mask"), 1, 0),), False, True),
    ),
    "width = text = N": (
        models.accident, 2, ((0, 0), 0, (), (TokenAxis(ROPE, 0, 0, batched=False),), True, True),
    ),
    "dicts in, tuple out": (
        models.nested, 2, ((0, 0, "streams", "image"), 0, (1,), (), False, False),
    ),
}  # fmt: skip
ILLEGAL: dict[str, tuple[Callable[[], models.Example], str]] = {
    "convolution": (models.convolution, "permuting its image tokens does not permute"),
    "convolution, zero gates": (
        lambda: models.convolution(zero_gates=True),
        "does not permute",
    ),
    "1-d convolution": (models.convolution_1d, "it mixes tokens by their position"),
    "1-d convolution, zero gates": (
        lambda: models.convolution_1d(zero_gates=True),
        "mixes tokens",
    ),
    "zero gates from outside": (models.outer_zero_gates, "mixes tokens by their position"),
    "window": (models.window, "permuting its image tokens does not permute its output"),
    "frames in the batch": (models.temporal, "permuting its image tokens does not permute"),
    "pinned token count": (models.fixed_grid, "it does not run on 18 of 36 tokens"),
    "scattered image tokens": (models.scattered, "its 36 image tokens are not contiguous"),
    "pooling": (models.pool, "no input has the shape of its output"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_blocks_are_found_with_their_roles(name: str) -> None:
    factory, count, (path, start, output, aligned, shares_index, removable) = LEGAL[name]
    model, inputs = factory()
    found = find_blocks(model, (), inputs)
    assert found.refused == ()
    assert len(found.blocks) == count
    spec = found.blocks[0]
    assert (spec.stream.path, spec.stream.start, spec.output) == (path, start, output)
    assert spec.aligned == aligned
    assert spec.shares_index is shares_index
    assert spec.removable is removable
    assert spec.error < 1e-12


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_blocks_are_refused_with_the_reason(name: str) -> None:
    factory, reason = ILLEGAL[name]
    model, inputs = factory()
    found = find_blocks(model, (), inputs, granularity="block")
    assert found.blocks == ()
    assert {refusal.block for refusal in found.refused} == {
        f"blocks.{i}" for i in range(len(model.blocks))
    }
    for refusal in found.refused:
        assert reason in refusal.reason


def test_num_tokens_and_width_are_the_streams() -> None:
    found = find_blocks(*_with_args(models.joint()))
    assert [(s.num_tokens, s.width) for s in found.blocks] == [(36, 16), (36, 16)]
    assert [spec.name for spec in found.blocks] == ["blocks.0", "blocks.1"]


def test_the_last_sd3_block_returns_no_text_so_it_may_be_skipped() -> None:
    found = find_blocks(*_with_args(models.tiny_sd3()))
    assert [spec.removable for spec in found.blocks] == [False, True]


def test_a_block_that_runs_twice_is_refused_and_the_others_are_not() -> None:
    found = find_blocks(*_with_args(models.twice()))
    assert [spec.name for spec in found.blocks] == ["blocks.1"]
    assert [refusal.block for refusal in found.refused] == ["blocks.0"]
    assert "it is called 2 times per forward" in found.refused[0].reason


def test_a_model_without_containers_has_no_candidates() -> None:
    found = find_blocks(*_with_args(models.no_container()))
    assert (found.blocks, found.refused) == ((), ())


@pytest.mark.parametrize("name", ["flux", "joint", "masked", "rotary", "accident"])
def test_one_sample_is_enough(name: str) -> None:
    model, inputs = (models.DIFFUSERS.get(name) or getattr(models, name))()
    two = find_blocks(model, (), inputs)
    one = find_blocks(model, (), models.one_sample(inputs))
    assert [(s.stream, s.aligned, s.shares_index) for s in one.blocks] == [
        (s.stream, s.aligned, s.shares_index) for s in two.blocks
    ]


@pytest.mark.parametrize(
    "name", ["tiny_dit", "convolution", "outer_zero_gates", "nested", "twice"]
)
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    model, inputs = getattr(models, name)()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    find_blocks(model, (), inputs)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key])
    for module in model.modules():
        assert module.training is training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert all(p.grad is None for p in model.parameters())


def test_no_hook_is_left_when_the_model_fails() -> None:
    model, inputs = models.plain()
    with pytest.raises(RuntimeError):
        find_blocks(model, (), {**inputs, "x": torch.randn(2, 3, 6, 6)})
    assert not any(module._forward_hooks for module in model.modules())


def test_findings_say_which_input_is_the_sample() -> None:
    assert find_blocks(*_with_args(models.tiny_sd3())).sample == (1, "hidden_states")
    model, inputs = models.nested()
    assert find_blocks(model, (), inputs).sample == (1, "inputs", "x")
    assert find_blocks(model, (inputs["inputs"],), {}).sample == (0, 0, "x")


LATENT, TEXT_STATES = torch.randn(2, 16), torch.randn(2, 7, 24)
PICTURE, CODES = torch.randn(2, 4, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "output", "name"),
    [
        # one vector is denoised: text of more axes is not the sample
        ({"latent": LATENT, "text": TEXT_STATES}, LATENT, "latent"),
        # text differs from the image in one axis only, and comes first
        ({"text": TEXT_STATES, "x": torch.randn(2, 36, 24)}, torch.randn(2, 36, 24), "x"),
        # noise and its variance
        ({"text": TEXT_STATES, "x": PICTURE}, torch.randn(2, 8, 8, 8), "x"),
        # an integer sample, with one score per code in the output
        ({"text": TEXT_STATES, "x": CODES}, torch.randn(2, 32, 8, 8), "x"),
        # an image to edit has the sample's shape, and comes first
        ({"cond": torch.randn(2, 4, 8, 8), "x": PICTURE}, PICTURE, "x"),
        ({"edited": torch.randn(2, 4, 8, 8), "noisy": PICTURE}, PICTURE, "edited"),
        # nothing fits, but there is no choice
        ({"t": torch.ones(2), "x": PICTURE}, torch.randn(2, 16, 12), "x"),
        # nothing fits, and there is one
        ({"text": TEXT_STATES, "x": PICTURE}, torch.randn(2, 3, 5, 7, 9), None),
    ],
)
def test_the_sample_is_told_from_the_other_inputs(
    inputs: dict[str, Any], output: Tensor, name: str | None
) -> None:
    assert sample_input((), inputs, output) == ((1, name) if name else ())


def test_without_a_sample_every_block_is_refused_for_that() -> None:
    class Two(models.OwnDiT):
        def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            result: Tensor = super().forward(x + y, t)
            return result.flatten(1)

    inputs = models.inputs_for()
    found = find_blocks(Two().eval(), (), {**inputs, "y": inputs["x"]})
    assert found.blocks == ()
    assert ["which one is the image" in refusal.reason for refusal in found.refused] == [
        True
    ] * 2


class CodeDiT(models.OwnDiT):
    """The sample is a map of codes, as in masked diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(9, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = super().forward(self.codes(x).movedim(-1, 1), t)
        return result


def test_the_sample_may_be_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 9, (2, 6, 6), generator=generator)
    found = find_blocks(CodeDiT().eval(), (), {**models.inputs_for(), "x": codes})
    assert found.sample == (1, "x")
    assert [(s.name, s.num_tokens) for s in found.blocks] == [
        ("blocks.0", 36),
        ("blocks.1", 36),
    ]


# ------------------------------------------------------------------------------- weak parameters


class WeakRoll(nn.Module):
    """Every token takes a little of the one before it, through a parameter that is nearly off."""

    def __init__(self, kind: str, size: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.mix = kind, nn.Linear(16, 16, bias=False)
        spread = 1 + 0.1 * torch.randn(16)
        self.gate = nn.Parameter(
            {
                "vector": size * spread,
                "scalar": torch.tensor([size]),
                "row of a table": torch.stack([torch.ones(16), size * spread]),
                "matrix": size * torch.randn(16, 16),
            }[kind]
        )

    def forward(self, x: Tensor) -> Tensor:
        rolled = x.roll(1, dims=1)
        x = x + self.mix(x)
        if self.kind == "matrix":
            return x + rolled @ self.gate
        return x + rolled * (self.gate[1] if self.kind == "row of a table" else self.gate)


@pytest.mark.parametrize("kind", ["vector", "scalar", "row of a table", "matrix"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-5])
def test_a_parameter_that_is_nearly_off_hides_nothing(kind: str, size: float) -> None:
    call = Call(((models.randn(2, 12, 16),), {}), models.randn(2, 12, 16))
    trial = Trial(WeakRoll(kind, size), call, TokenAxis((0, 0), 1), (), 12)
    assert trial.permutation_error(()) > 1e-3
    failure = trial.failure(())
    assert failure is not None
    assert "it mixes tokens by their position" in failure


class OwnPrecision(nn.Module):
    """Computes in another precision than it is given, as blocks do around their softmax."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dtype, self.qkv = dtype, nn.Linear(16, 48)
        self.table = torch.linspace(0.5, 2, 16)  # no buffer, so .double() leaves it as it is

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).to(self.dtype).chunk(3, dim=-1)
        scale = torch.arange(16, dtype=self.dtype) + torch.full((16,), 0.1, dtype=self.dtype)
        return x + ((q * scale @ k.mT).softmax(-1) @ v).type_as(x) * self.table.to(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_tried_in_float64_whatever_it_asks_for(dtype: torch.dtype) -> None:
    call = Call(((models.randn(2, 12, 16),), {}), models.randn(2, 12, 16))
    trial = Trial(OwnPrecision(dtype), call, TokenAxis((0, 0), 1), (), 12)
    assert trial.failure(()) is None
    assert trial.permutation_error(()) < 1e-12


class Float32Only(OwnPrecision):
    """Runs in float32 and nothing else, like a kernel that is compiled for it."""

    def __init__(self, shift: int) -> None:
        super().__init__(torch.float32)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x.roll(self.shift, dims=1))


def test_a_block_that_runs_in_float32_only_is_tried_in_float32() -> None:
    call = Call(((models.randn(2, 12, 16),), {}), models.randn(2, 12, 16))
    legal, illegal = (
        Trial(Float32Only(shift), call, TokenAxis((0, 0), 1), (), 12) for shift in (0, 1)
    )
    assert legal.failure(()) is None
    assert 0 < legal.permutation_error(()) < 1e-5
    assert illegal.permutation_error(()) > 0.1


# ------------------------------------------------------------------------- streams and residuals


class Pair(nn.Module):
    """``order`` says which output is whose residual."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.order, self.one, self.two = order, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = a + self.one(b), b + self.two(a)
        return {"ab": (a, b), "ba": (b, a), "work and a": (self.one(b), a), "b": (b,)}[
            self.order
        ]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ab", {(0,): (0, 0), (1,): (1, "b")}),
        ("ba", {(0,): (1, "b"), (1,): (0, 0)}),
        ("work and a", {(0,): (1, "b"), (1,): (0, 0)}),
        ("b", {(0,): (1, "b")}),
    ],
)
def test_an_output_goes_with_the_input_that_it_is_added_to(
    order: str, expected: dict[Any, Any]
) -> None:
    block, one, two = Pair(order), models.randn(2, 5, 8), models.randn(2, 5, 8, seed=1)
    output = block(one, b=two)
    assert residual_pairs(block, Call(((one,), {"b": two}), output)) == expected


def test_a_branch_may_run_where_nothing_adds_its_output() -> None:
    """No residual inside and none outside: what bypasses the block is what it was given."""

    class NoResidual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.work = nn.Sequential(nn.Linear(width, width), nn.GELU())

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            result: Tensor = self.work(x) * condition[:, None]
            return result

    found = find_blocks(models.OwnDiT(NoResidual).eval(), (), models.inputs_for())
    assert found.refused == ()
    assert len(found.blocks) == 2


# ------------------------------------------------------------------------------- roles of arguments


class ManySizes(nn.Module):
    """Two tables (N, D) behind a dozen arguments with an axis of N + another argument's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.work = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        *parts, cos, sin = others
        size = sum(part[..., :1].mean() for part in parts)
        return x + self.work(x * cos) * size + self.work(x) * sin


def test_channels_of_arguments_are_no_token_counts() -> None:
    block = ManySizes(16)
    odd = [models.randn(2, 20, seed=i) for i in range(9)]  # 20 = 12 tokens + 8 channels
    args = (models.randn(2, 12, 16), models.randn(2, 8), *odd)
    tables = (models.randn(12, 16, seed=20), models.randn(12, 16, seed=21))
    call = Call(((*args, *tables), {}), models.randn(2, 12, 16))
    trial = Trial(block, call, TokenAxis((0, 0), 1), (), 12)
    aligned, _ = trial.smallest_alignment(())
    assert aligned == tuple(TokenAxis((0, i), 0, 0, batched=False) for i in (11, 12))


class JointTable(nn.Module):
    """The stream is (registers, image); text is an argument of its own, and a table runs over all three."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, text: Tensor, table: Tensor) -> Tensor:
        both = torch.cat([text, x], dim=1)
        keys, queries = self.to_k(both) * table, x * table[:, text.shape[1] :]
        return x + (queries @ keys.mT).softmax(-1) @ self.to_v(both)


def test_a_table_may_run_over_another_argument_and_the_whole_stream() -> None:
    stream, text, table = (models.randn(2, n, 16, seed=n) for n in (15, 4, 19))
    call = Call(((stream, text, table), {}), stream)
    trial = Trial(JointTable(), call, TokenAxis((0, 0), 1, 3), (), 12)
    assert trial.smallest_alignment(())[0] == (TokenAxis((0, 2), 1, 7),)


# --------------------------------------------------------------------- shapes that depend on values


class Sparse(models.OwnDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = super().forward(x, t)
        flat = result.flatten()
        result = result.clone()
        flat = flat.index_put((flat > 0,), flat[flat > 0] * 2)
        return flat.view_as(result)


def test_shapes_that_depend_on_values_are_an_error_of_ours() -> None:
    with pytest.raises(CaptureError, match="depend on the values of tensors"):
        capture(Sparse().eval(), (), models.inputs_for(), ())


# ------------------------------------------------------------------------------------- candidates


class Numbered(nn.Module):
    """Blocks as attributes; what is named alike and is none of them stays out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = models.Embedding(16, 6)
        self.block1, self.block2 = models.Block(), models.Block()
        self.proj1, self.proj2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        tokens = self.block2(self.block1(tokens, condition), self.proj1(condition))
        result: Tensor = self.proj2(tokens)
        return result


def test_numbered_attributes_are_candidates_where_no_container_is() -> None:
    found = find_blocks(Numbered().eval(), (), models.inputs_for())
    assert [spec.name for spec in found.blocks] == ["block1", "block2"]
    assert found.refused == ()


def _names(specs: tuple[BlockSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


class Layers(nn.Module):
    """One block, written as a row of two different layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([models.Block(width), Residual(width)])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, condition)
        return x


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        result: Tensor = x + self.two(self.one(x).relu())
        return result


def test_different_layers_in_a_row_are_one_block() -> None:
    found = find_blocks(models.OwnDiT(Layers).eval(), (), models.inputs_for())
    assert _names(found.blocks) == ["blocks.0", "blocks.1"]


class Stage(nn.Module):
    """Two blocks in a row, and maybe half as much again that is none."""

    def __init__(self, width: int, *, own: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([models.Block(width) for _ in range(2)])
        self.own = models.Block(width) if own else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x if self.own is None else self.own(x, condition)


@pytest.mark.parametrize("own", [False, True])
def test_a_row_of_blocks_is_opened_and_a_block_with_more_in_it_is_not(own: bool) -> None:
    model = models.OwnDiT(Stage, depth=2, own=own).eval()
    found = find_blocks(model, (), models.inputs_for())
    inner = [f"blocks.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    assert _names(found.blocks) == (["blocks.0", "blocks.1"] if own else inner)
    assert found.refused == ()


class Counting(Block):
    """Tokens with a position each; what becomes of the positions is an option."""

    def __init__(self, returns: str, **options: Any) -> None:
        super().__init__(**options)
        self.table, self.returns = nn.Embedding(40, 16), returns

    def forward(  # type: ignore[override]
        self, x: Tensor, condition: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = super().forward(x + self.table(ids) * mask[..., None], condition)
        kinds = {
            "next": ids + 1,
            "itself": ids,
            "mask": (mask > 0) & (ids >= 0),
            "size": mask.sum(),
        }
        return x, kinds[self.returns]


class CountingDiT(models.OwnDiT):
    """What a block returns beside its stream goes on to the next block, or nowhere."""

    def __init__(self, returns: str, reads: bool) -> None:
        super().__init__(block=functools.partial(Counting, returns), side=4)
        self.reads = reads

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        ids = torch.arange(16).expand(len(x), -1)
        mask = torch.ones(len(x), 16)
        for block in self.blocks:
            tokens, other = block(tokens, condition, ids, mask)
            if self.reads and other.shape == ids.shape:
                ids, mask = (other, mask) if other.dtype == ids.dtype else (ids, other)
        return self.image(tokens)


@pytest.mark.parametrize(
    ("returns", "reads", "reason"),
    [
        ("next", True, "permuting its image tokens does not permute its output"),
        ("mask", True, "permuting its image tokens does not permute its output"),
        ("next", False, None),
        ("mask", False, None),
        ("itself", True, None),  # the graph takes the input
        ("size", False, None),
    ],
)
def test_whole_numbers_that_a_block_returns_are_looked_at(
    returns: str, reads: bool, reason: str | None
) -> None:
    model, inputs = CountingDiT(returns, reads).eval(), models.inputs_for(4)
    found = find_blocks(model, (), inputs, granularity="block")
    if reason is not None:
        assert reason in {r.block: r.reason for r in found.refused}["blocks.0"]
        return
    assert _names(found.blocks) == ["blocks.0", "blocks.1"]
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    assert frozen[0](**inputs).shape == model(**inputs).shape


class InPlace(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        x += super().forward(x, condition).sin()
        return x


class Dropping(Block):
    """Dropout as a function is on unless it is told otherwise."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(functional.dropout(x, 0.1), condition)


class Noisy(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition) + 0.1 * torch.randn_like(x)


class Pushing(Block):
    """The first half of a U: what it returns waits in a list for the second half."""

    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:  # type: ignore[override]
        x = super().forward(x, condition)
        skips.append(x)
        return x


class Popping(Block):
    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x + skips.pop(), condition)


class ListDiT(models.OwnDiT):
    def __init__(self) -> None:
        super().__init__(side=4)
        kinds = (Pushing, Pushing, Popping, Popping)
        self.blocks = nn.ModuleList(kind(width=16) for kind in kinds)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        skips: list[Tensor] = []
        for block in self.blocks:
            tokens = block(tokens, condition, skips)
        return self.image(tokens)


BAD_HABITS = {
    "it writes to its input args[0] in place": lambda: models.OwnDiT(block=InPlace, side=4),
    "it is random, also in evaluation mode": lambda: models.OwnDiT(block=Dropping, side=4),
    "it is random, also": lambda: models.OwnDiT(block=Noisy, side=4),
    "it changes a list or a dict that it is given": ListDiT,
}


@pytest.mark.parametrize("reason", BAD_HABITS)
def test_what_a_block_does_besides_computing_is_the_reason(reason: str) -> None:
    model, inputs = BAD_HABITS[reason]().eval(), models.inputs_for(4)
    findings = find_blocks(model, (), inputs)
    assert findings.refused
    for refusal in findings.refused:
        assert reason in refusal.reason
    planned = dcr.inspect(model, inputs).refused
    assert set(planned) == {refusal.block for refusal in findings.refused}
    assert all(reason in words for words in planned.values())


class ChangingDiT(models.OwnDiT):
    """Writes to its own input; the blocks do nothing of the kind."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5), t.mul_(0.5))


def test_the_example_is_not_written_to() -> None:
    inputs = models.inputs_for(4)
    routed = dcr.route(ChangingDiT(side=4).eval(), inputs)
    assert len(routed.program.blocks) == 2
    for found, given in zip(inputs.values(), models.inputs_for(4).values(), strict=True):
        assert torch.equal(found, given)


class Alike(models.OwnDiT):
    """``img_blocks`` beside ``img.blocks``."""

    def __init__(self) -> None:
        super().__init__(side=4, depth=0)
        self.img_blocks = nn.ModuleList([Block(width=16)])
        self.img = nn.Module()
        self.img.blocks = nn.ModuleList([Block(width=16)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in (*self.img_blocks, *self.img.blocks):
            tokens = block(tokens, condition)
        return self.image(tokens)


def test_of_two_blocks_that_are_one_name_in_a_graph_the_first_is_routed() -> None:
    model, inputs = Alike().eval(), models.inputs_for(4)
    program = dcr.route(model, inputs).program
    assert _names(program.blocks) == ["img_blocks.0"]
    (refusal,) = program.refused
    assert refusal.block == "img.blocks.0"
    assert "differ by dots and underscores only" in refusal.reason
    frozen = dcr.freeze(program.module, keep_ratio=0.5)
    assert frozen[0](**inputs).shape == model(**inputs).shape


def test_describe_is_one_line_with_the_roles() -> None:
    found = find_blocks(*_with_args(models.rotary()))
    text = describe(found.blocks[0])
    assert text.startswith(
        "blocks.0: 36 tokens x 16 in args[0], token-aligned: kwargs['rope']"
    )
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("flexible_table", 0), ("rotary_two_heads", 0), ("rotary_one_batch", 0), ("accident", 0),
        ("masked", 0), ("joint", 5),
    ],
)  # fmt: skip
def test_roles_are_right_because_each_sample_gets_what_it_gets_alone(
    name: str, first: int, cases: Callable[..., Case]
) -> None:
    """Routed at K < N, a batch computes what a slow loop over its samples computes."""
    case = cases(name)
    inputs = dict(case.inputs)
    if "mask" in inputs:
        inputs["mask"] = (models.randn(2, 36, seed=8) > 0).float()  # cut wrongly, it shows
    spec = case.routed.blocks[0]
    kept = spec.num_tokens // 3
    weights = case.router_weights()
    with torch.no_grad(), keeping(case, dict.fromkeys(case.names, kept)):
        found = case.routed.module(**inputs)
        expected = _slow(case.model, inputs, weights, kept, first, spec)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _slow(
    model: nn.Module, inputs: dict[str, Any], weights: Any, kept: int, first: int, spec: Any
) -> torch.Tensor:
    """Each sample alone, with the tokens that it keeps; tables and masks cut beside them."""
    forwards = {name: model.get_submodule(name).forward for name in weights}

    def wrap(name: str) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            image = x[:, first : first + spec.num_tokens]
            logits = image @ weights[name]  # (B, N)
            if spec.shares_index:
                logits = logits.mean(0).expand(len(x), -1)
            rows = []
            for b in range(len(x)):
                best = logits[b].argsort(descending=True)[:kept]
                keep = torch.cat([torch.arange(first), first + best])
                mine = {k: _cut(v, b, best, spec.num_tokens) for k, v in kwargs.items()}
                y = forwards[name](x[b : b + 1, keep], *(a[b : b + 1] for a in args), **mine)
                row = x[b].clone()
                row[keep] = y[0]
                rows.append(row)
            return torch.stack(rows)

        return run

    try:
        for name in weights:
            model.get_submodule(name).forward = wrap(name)
        result: torch.Tensor = model(**inputs)
    finally:
        for name in weights:
            del model.get_submodule(name).forward
    return result


def _cut(
    value: torch.Tensor, sample: int, best: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """A mask (B, N) of one sample, or a table (N, D) or (1, N, D) of all of them."""
    if value.shape == (2, num_tokens):
        return value[sample : sample + 1, best]
    return value[:, best] if value.ndim == 3 else value[best]


def _with_args(example: models.Example) -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    return example[0], (), example[1]


def test_a_legal_block_runs_no_more_often_than_its_experiments_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64 as it is, permuted and cut; in its own precision once to be seen, and with every block bypassed."""
    runs: collections.Counter[torch.dtype] = collections.Counter()
    forward = Block.forward

    def counted(self: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, FakeTensor):
            runs[x.dtype] += 1
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    model, inputs = models.plain(depth=3)
    assert len(find_blocks(model, (), inputs).blocks) == 3
    assert runs[torch.float64] == 3 * 3
    # seen once; bypassed on the example, on another image, on another first sample; twice with zeros
    assert runs[torch.float32] == 3 * (1 + 3 + 2)


class ImageFirst(Block):
    def forward(  # type: ignore[override]
        self, image: Tensor, text: Tensor, condition: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        both = super().forward(torch.cat([image, text], 1), condition, mask=mask)
        return both[:, : image.shape[1]], both[:, image.shape[1] :]


class MaskedDiT(OwnDiT):
    """One mask over the tokens of the image, then of the text."""

    def __init__(self) -> None:
        super().__init__(block=ImageFirst)
        self.text = nn.Linear(12, self.width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:  # type: ignore[override]
        tokens, condition = self.embed(x, t)
        words = self.text(text)
        mask = torch.cat([text_mask.new_ones(x.shape[0], self.num_tokens), text_mask], 1)
        for block in self.blocks:
            tokens, words = block(tokens, words, condition, mask)
        return self.image(tokens)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_is_cut_where_its_image_tokens_are_although_the_example_masks_nothing(
    kind: torch.dtype, padded: bool
) -> None:
    """Of an example without padding nobody could tell: text that is masked later would be seen, and image tokens not."""
    torch.manual_seed(0)
    mask = torch.ones(2, 5, dtype=kind)
    if padded:
        mask[:, 3:] = 0
    model = MaskedDiT().eval()
    inputs = inputs_for(text=torch.randn(2, 5, 12), text_mask=mask)
    routed = dcr.route(model, inputs)
    for spec in routed.program.blocks:
        assert [(axis.path, axis.start) for axis in spec.aligned] == [((0, 3), 0)]


class ReZeroDiT(OwnDiT):
    """Its gates are scalars that are handed to the blocks, and zero when training begins."""

    def __init__(self, value: float) -> None:
        super().__init__(block=Convolving)
        self.gates = nn.Parameter(torch.full((len(self.blocks),), value))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block, gate in zip(self.blocks, self.gates.unbind(), strict=True):
            tokens = block(tokens, condition, gate)
        return self.image(tokens)


class Convolving(Block):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition) + gate * self.convolution(x.mT).mT


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_scalar_gate_that_is_zero_hides_nothing(value: float) -> None:
    model = ReZeroDiT(value).eval()
    found = find_blocks(model, (), inputs_for(), granularity="block")
    assert not found.blocks
    assert {row.block for row in found.refused} >= {"blocks.0", "blocks.1"}


class UpToLength(Block):
    def forward(self, x: Tensor, condition: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        return super().forward(x, condition, mask=mask)


class WithLengths(OwnDiT):
    def __init__(self) -> None:
        super().__init__(block=UpToLength)

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition, lengths)
        return self.image(tokens)


@pytest.mark.parametrize("lengths", [[36, 36], [36, 20]])
def test_a_block_that_counts_its_tokens_in_a_tensor_is_refused(lengths: list[int]) -> None:
    """With fewer tokens the first of them would be taken for the valid ones; an example of whole lengths does not show it."""
    found = find_blocks(
        WithLengths().eval(),
        (),
        inputs_for(lengths=torch.tensor(lengths)),
        granularity="block",
    )
    assert not found.blocks


class Labelled(Block):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.label = nn.Embedding(40, width)

    def forward(self, x: Tensor, condition: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition + self.label(lengths))


def test_labels_that_are_the_number_of_tokens_by_accident_hinder_nothing() -> None:
    model = WithLengths()
    model.blocks = nn.ModuleList(Labelled() for _ in range(2))
    for labels in ([36, 36], [3, 36]):
        given = inputs_for(lengths=torch.tensor(labels))
        assert len(find_blocks(model.eval(), (), given, granularity="block").blocks) == 2
