"""Which blocks may be routed: every legal model with the right roles, every illegal one refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffcr_compile.blocks import TokenAxis
from diffcr_compile.legality import describe, find_blocks
from tests import models
from tests.conftest import Case, keeping

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
    found = find_blocks(model, (), inputs)
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
