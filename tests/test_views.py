"""Blocks whose streams are (tokens, batch, channels) or (tokens, channels): found, routed, frozen, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.blocks import StreamView
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.legality import find_blocks
from diffcr_compile.planning.dry_run import dry_run
from diffcr_compile.recorded import Call
from diffcr_compile.views import (
    given_call,
    guess_view,
    show_block,
    shown,
    shown_call,
    turn_block,
)

TOKENS, WIDTH = 12, 16


class Block(nn.Module):
    """Attention and feed-forward over (N, B, C), with a table (N, 1, C) and a shift (N, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, table: Tensor, *, shift: Tensor) -> Tensor:
        y = x * table + shift
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class TokensFirst(nn.Module):
    block = Block

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.shift = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        table = torch.rand(TOKENS, 1, WIDTH, generator=torch.Generator().manual_seed(3))
        self.register_buffer("table", 0.5 + table)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        shift = self.shift(x) * t[:, None] / 1000
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, self.table, shift=shift)
        return self.leave(x).transpose(0, 1)


class PackedBlock(nn.Module):
    """A prompt and an image, packed: each is (tokens, C); the image sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, text: Tensor, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv(torch.cat([text, image])).chunk(2, dim=-1)
        scores = (self.q(image) * table) @ key.T / WIDTH**0.5
        image = image + scores.softmax(-1) @ value
        return text + self.mlp(text), image + self.mlp(image)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([PackedBlock() for _ in range(2)])
        self.register_buffer("text", torch.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH))
        table = torch.rand(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
        self.register_buffer("table", 0.5 + table)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == 1
        text, image = self.text + t / 1000, self.enter(x[0])
        for block in self.blocks:
            text, image = block(text, image, self.table)
        return self.leave(image)[None]


class Shifted(Block):
    def forward(self, x: Tensor, table: Tensor, *, shift: Tensor) -> Tensor:
        return super().forward(x, table, shift=shift) + x.roll(1, 0)


class MixesTokens(TokensFirst):
    block = Shifted


def example(
    kind: type[nn.Module], tokens: int = TOKENS
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = 1 if kind is Packed else 2
    inputs = {"x": torch.randn(batch, tokens, 3), "t": torch.linspace(900, 100, batch)}
    return kind().eval(), inputs


def reference(model: Any, routers: Any, inputs: dict[str, Tensor], kept: int) -> Tensor:
    """Sample by sample and token by token, with plain indexing on the model's own layout."""
    results = []
    for b in range(len(inputs["x"])):
        x, t = inputs["x"][b], inputs["t"][b]
        text = getattr(model, "text", torch.zeros(())) + t / 1000
        stream = model.enter(x)
        for name, block in model.blocks.named_children():
            scores = routers[f"blocks.{name}"](stream[None])[0]
            best = sorted(scores.argsort(descending=True)[:kept].tolist())
            chosen, table = stream[best], model.table[best]
            if isinstance(model, Packed):
                text, made = block(text, chosen, table)
            else:
                shift = (model.shift(x) * t / 1000)[best]
                made = block(chosen[:, None], table, shift=shift[:, None])[:, 0]
            stream = stream.clone()
            for row, place in enumerate(best):
                stream[place] = made[row]
        results.append(model.leave(stream))
    return torch.stack(results)


@pytest.mark.parametrize("kind", [TokensFirst, Packed])
@torch.no_grad()
def test_all_steps(kind: type[nn.Module], tmp_path: Path) -> None:
    model, inputs = example(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    dense = model(**inputs)
    routed = dcr.route(model, inputs)
    assert set(routed.routers) == {"blocks.0", "blocks.1"}
    assert torch.equal(routed(**inputs), dense)
    assert {n for n, _ in routed.named_parameters()} >= {
        n for n, _ in model.named_parameters()
    }
    frozen = dcr.freeze(routed, keep_ratio=0.5)
    expected = reference(model, routed.routers, inputs, TOKENS // 2)
    # sums of attention in another order: fp32 rounding; a wrong token is off by 0.01 and more
    torch.testing.assert_close(frozen[0](**inputs), expected, rtol=1e-4, atol=1e-5)
    assert (expected - dense).abs().max() > 0.01
    artifact = dcr.export(frozen, tmp_path)  # compares ONNX Runtime with it
    assert artifact.manifest.parity["buckets"][0]["passed"]
    assert type(model.blocks[0]) is (PackedBlock if kind is Packed else Block)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@torch.no_grad()
def test_another_batch_than_the_example_is_exact() -> None:
    model, inputs = example(TokensFirst)
    routed = dcr.route(model, inputs)
    rows = torch.tensor([1, 0, 1])
    more = {name: tensor[rows] for name, tensor in inputs.items()}
    assert torch.equal(routed(**more), model(**more))


def test_weights_are_trained_where_the_user_sees_them() -> None:
    model, inputs = example(TokensFirst)
    routed = dcr.route(model, inputs)
    routed.train()
    routed(**inputs).square().mean().backward()
    gradient = model.blocks[0].attention.in_proj_weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_block_that_mixes_tokens_is_refused_in_this_layout_too() -> None:
    model, inputs = example(MixesTokens)
    with pytest.raises(UnsupportedModelError, match="mixes tokens by their position"):
        dcr.route(model, inputs)


def test_a_dry_run_finds_the_same() -> None:
    model, inputs = example(TokensFirst)
    run = dry_run(model, (), inputs)
    full = find_blocks(model, (), inputs)
    roles = [(b.name, b.view, b.stream, b.aligned) for b in full.blocks]
    assert [(b.name, b.view, b.stream, b.aligned) for b in run.findings.blocks] == roles
    assert run.program is not None
    assert run.same_as == {"blocks.1": "blocks.0"}


def test_as_many_tokens_as_samples_are_not_guessed() -> None:
    stream = torch.zeros(2, 2, 4)
    assert guess_view(Call(((stream,), {}), stream), batch=2) is None


def test_one_vector_per_sample_is_no_stream() -> None:
    vector = torch.zeros(2, 4)
    assert guess_view(Call(((vector,), {}), vector), batch=2) is None
    assert guess_view(Call(((vector[:1],), {}), vector[:1]), batch=1) is None


@torch.no_grad()
def test_a_shown_block_and_a_turned_one_compute_what_the_block_does() -> None:
    block = Block().eval()
    x, table, shift = (
        torch.randn(5, 2, WIDTH),
        torch.rand(5, 1, WIDTH),
        torch.randn(5, 2, WIDTH),
    )
    call = Call(((x, table), {"shift": shift}), block(x, table, shift=shift))
    view = guess_view(call, batch=2)
    assert view == StreamView("tokens_first", ((0, 0), (0, 1), (1, "shift")), ((),))
    batch_first = shown_call(call, view)
    assert batch_first.output.shape == (2, 5, WIDTH)
    assert torch.equal(given_call(batch_first, view).output, call.output)
    turned = turn_block(block, view)
    seen: list[Tensor] = []
    turned.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(turned(x, table, shift=shift), call.output)
    args, kwargs = batch_first.tree
    for candidate in (show_block(block, view), shown(turned), copy.deepcopy(shown(turned))):
        assert torch.equal(candidate(*args, **kwargs), batch_first.output)
        assert isinstance(candidate, Block)
    assert torch.equal(seen[0], batch_first.output)
    assert shown(block) is block
    assert turned.mlp is block.mlp
