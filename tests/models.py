"""Small models for the tests: four of diffusers, and hand-written ones with one property each.

Every factory returns ``(model, kwargs)``: a seeded model in evaluation mode and example inputs
of batch 2, whose two samples differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- diffusers


def tiny_dit() -> Example:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1,
        num_layers=3, sample_size=16, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip
    for block in model.transformer_blocks:
        # in training mode labels are dropped at random, which no comparison survives
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    inputs = {
        "hidden_states": randn(2, 1, 16, 16),
        "timestep": torch.tensor([300.0, 700.0]),
        "class_labels": torch.tensor([1, 5]),
    }
    return model.eval(), inputs


def tiny_pixart() -> Example:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=2, cross_attention_dim=32, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 16, 16),
        "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model.eval(), inputs


def tiny_sd3() -> Example:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=24,
        pooled_projection_dim=48, out_channels=4, pos_embed_max_size=12, dual_attention_layers=(),
        qk_norm=None,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 7, 24, seed=1),
        "pooled_projections": randn(2, 48, seed=2),
        "timestep": torch.tensor([3, 700]),
    }
    return model.eval(), inputs


def tiny_flux() -> Example:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 36, 4),
        "encoder_hidden_states": randn(2, 11, 24, seed=1),
        "pooled_projections": randn(2, 20, seed=2),
        "timestep": torch.tensor([0.5, 0.9]),
        "img_ids": randn(36, 3, seed=3),
        "txt_ids": randn(11, 3, seed=4),
    }
    return model.eval(), inputs


DIFFUSERS: dict[str, Callable[[], Example]] = {
    "dit": tiny_dit, "pixart": tiny_pixart, "sd3": tiny_sd3, "flux": tiny_flux,
}  # fmt: skip


def one_sample(inputs: dict[str, Any], sample: int = 0) -> dict[str, Any]:
    """One sample of a batch of 2; every batched input of this file has the batch on axis 0."""
    return {
        name: value[sample : sample + 1] if is_batched(value) else value
        for name, value in inputs.items()
    }


def is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[0] == 2


# ---------------------------------------------------------------------- parts of own models


class Attention(nn.Module):
    """Plain attention; `rope` (..., N, head width) multiplies queries and keys, `mask` is (B, N)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, -1).unbind(2)
        )  # (B, L, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
        if rope is not None:
            q, k = q * rope, k * rope
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out(mixed)


class Block(nn.Module):
    """adaLN-Zero block: ``x + gate * attention``, ``x + gate * mlp``; joint streams welcome."""

    def __init__(self, width: int = 16, heads: int = 4, zero_gates: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Linear(width, 3 * width)
        if zero_gates:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rope: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        scale, gate_1, gate_2 = self.modulation(condition)[:, None].chunk(3, dim=-1)
        x = x + gate_1 * self.attention(self.mix(self.norm(x) * (1 + scale)), rope, mask)
        return x + gate_2 * self.mlp(self.norm(x))

    def mix(self, x: Tensor) -> Tensor:
        """A place for illegal things."""
        return x


class ConvBlock(Block):
    """Illegal: a depth-wise convolution over the token grid."""

    def __init__(self, width: int = 16, side: int = 6, **options: Any) -> None:
        super().__init__(width, **options)
        self.side, self.conv = side, nn.Conv2d(width, width, 3, padding=1, groups=width)

    def mix(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (-1, self.side))
        return self.conv(grid).flatten(2).transpose(1, 2)


class Conv1dBlock(Block):
    """Illegal, and runs on any number of tokens: only the permutation test can tell."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(width, **options)
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class WindowBlock(Block):
    """Illegal: attends inside windows of 9 neighbouring tokens."""

    def mix(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 9))
        return (windows + windows.mean(2, keepdim=True)).flatten(1, 2)


class TemporalBlock(Block):
    """Illegal: mixes the same token of neighbouring samples (frames folded into the batch)."""

    def mix(self, x: Tensor) -> Tensor:
        frames = x.unflatten(0, (-1, 2))
        return (frames + frames.mean(1, keepdim=True)).flatten(0, 1)


class FixedGridBlock(Block):
    """Illegal: permutes well, but a learned table pins the number of tokens."""

    def __init__(self, width: int = 16, num_tokens: int = 36) -> None:
        super().__init__(width)
        self.table = nn.Parameter(torch.ones(1, num_tokens, 1), requires_grad=False)
        self.register_buffer("count", torch.ones(1, num_tokens, 1))

    def mix(self, x: Tensor) -> Tensor:
        return x * self.count


class Embedding(nn.Module):
    """Sample (B, 2, S, S) -> tokens (B, N, C) and timestep -> condition (B, C)."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 1)
        self.time = nn.Linear(1, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, side * side, width))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.patch(x).flatten(2).transpose(1, 2) + self.position, self.time(t[:, None])


class OwnDiT(nn.Module):
    """Patchify, blocks, un-patchify; the subclasses say what the blocks are given."""

    def __init__(
        self, block: Callable[..., nn.Module] = Block, width: int = 16, side: int = 6,
        depth: int = 2, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(1)
        self.width, self.side = width, side
        self.embed = Embedding(width, side)
        self.blocks = nn.ModuleList([block(width=width, **options) for _ in range(depth)])
        self.head = nn.Linear(width, 2)

    @property
    def num_tokens(self) -> int:
        return self.side**2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.image(tokens)

    def image(self, tokens: Tensor) -> Tensor:
        return self.head(tokens).transpose(1, 2).unflatten(2, (self.side, self.side))


def inputs_for(side: int = 6, **more: Any) -> dict[str, Any]:
    return {"x": randn(2, 2, side, side), "t": torch.tensor([0.2, 0.7]), **more}


# ------------------------------------------------------------------------- own legal models


def plain(**options: Any) -> Example:
    return OwnDiT(**options).eval(), inputs_for()


def zero_gates() -> Example:
    """Fresh adaLN-Zero: every block is the identity, and legal."""
    return OwnDiT(zero_gates=True).eval(), inputs_for()


class JointDiT(OwnDiT):
    """Text and image in one sequence, text first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.text = nn.Linear(12, self.width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        stream = torch.cat([self.text(text), tokens], dim=1)
        for block in self.blocks:
            stream = block(stream, condition)
        return self.image(stream[:, text.shape[1] :])


def joint() -> Example:
    """36 image tokens behind 5 text tokens."""
    return JointDiT().eval(), inputs_for(text=randn(2, 5, 12, seed=1))


class RotaryDiT(OwnDiT):
    """A rotary-like table over positions, made outside the blocks; `axes` is its shape."""

    def __init__(self, axes: str, **options: Any) -> None:
        super().__init__(**options)
        self.axes = axes

    def table(self) -> Tensor:
        position = torch.arange(self.num_tokens, dtype=torch.float32)[:, None]
        table = torch.cos(position * torch.tensor([0.1, 0.3, 0.5, 0.7]) + 0.3)  # (N, 4)
        return table[None] if self.axes == "1ND" else table

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition, rope=self.table())
        return self.image(tokens)


def rotary(heads: int = 4, axes: str = "ND") -> Example:
    """A table without batch axis that broadcasts over heads; 2 heads look like a batch of 2."""
    return RotaryDiT(axes, width=4 * heads, heads=heads).eval(), inputs_for()


class TableBlock(Block):
    """Scales tokens by a table that may have a batch axis or not: (N, C) or (B, N, C)."""

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * torch.cat([rope] * 4, dim=-1), condition)


def flexible_table() -> Example:
    """A table without batch axis that each sample may cut by its own index."""
    return RotaryDiT("ND", block=TableBlock).eval(), inputs_for()


class MaskedDiT(OwnDiT):
    """A (B, N) mask over keys."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition, mask=mask)
        return self.image(tokens)


def masked() -> Example:
    """A mask that is all ones in the example: permuting it changes nothing."""
    return MaskedDiT().eval(), inputs_for(mask=torch.ones(2, 36))


class CrossBlock(Block):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(  # type: ignore[override]
        self, x: Tensor, text: Tensor, condition: Tensor, rope: Tensor | None = None
    ) -> Tensor:
        key, value = self.kv(text).chunk(2, dim=-1)
        x = x + (self.q(x) @ key.transpose(1, 2)).softmax(-1) @ value
        return super().forward(x, condition, rope)


class AccidentDiT(RotaryDiT):
    """Width = text length = text width = N, so every axis of everything looks like tokens."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, text, condition, rope=self.table())
        return self.image(tokens)


def accident() -> Example:
    """16 tokens, 16 channels, 16 text tokens of 16 channels; the table does run along tokens."""
    model = AccidentDiT("ND", block=CrossBlock, side=4, heads=4)
    return model.eval(), inputs_for(4, text=randn(2, 16, 16, seed=1))


class Output(NamedTuple):
    image: Tensor
    tokens: Tensor


class NestedBlock(Block):
    """Takes its condition in a dict and returns a tuple (text, image), as SD3 and FLUX do."""

    def forward(self, data: dict[str, Any], extra: list[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        image, text = data["streams"]["image"], data["streams"]["text"]
        both = super().forward(torch.cat([text, image], dim=1), extra[0])
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class NestedDiT(OwnDiT):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.text = nn.Linear(12, self.width)

    def forward(self, inputs: dict[str, Any], *, scale: float = 1.0) -> Output:  # type: ignore[override]
        tokens, condition = self.embed(inputs["x"], inputs["t"])
        text = self.text(inputs["conditions"][0])
        for block in self.blocks:
            data = {"streams": {"image": tokens, "text": text}, "flag": True}
            text, tokens = block(data, [condition])
        return Output(self.image(tokens) * scale, text)


def nested() -> Example:
    text = randn(2, 5, 12, seed=1)
    return NestedDiT(block=NestedBlock).eval(), {"inputs": inputs_for(conditions=[text])}


class KeywordDiT(OwnDiT):
    """Everything but the sample comes through ``**kwargs``."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, kwargs["t"]) + kwargs.get("shift", 0.0)


def keyword() -> Example:
    return KeywordDiT().eval(), inputs_for()


# ----------------------------------------------------------------------- own illegal models


def convolution(zero_gates: bool = False) -> Example:
    return OwnDiT(block=ConvBlock, zero_gates=zero_gates).eval(), inputs_for()


def convolution_1d(zero_gates: bool = False) -> Example:
    return OwnDiT(block=Conv1dBlock, zero_gates=zero_gates).eval(), inputs_for()


def window() -> Example:
    return OwnDiT(block=WindowBlock).eval(), inputs_for()


def temporal() -> Example:
    return OwnDiT(block=TemporalBlock).eval(), inputs_for()


def fixed_grid() -> Example:
    return OwnDiT(block=FixedGridBlock).eval(), inputs_for()


class SingleModulationBlock(Conv1dBlock):
    """Illegal, and its gate comes from outside, as in PixArt (adaLN-single)."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        scale, gate = modulation[:, None].chunk(2, dim=-1)
        return x + gate * self.attention(self.mix(self.norm(x) * (1 + scale)))


class SingleModulationDiT(OwnDiT):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.modulation = nn.Linear(self.width, 2 * self.width)
        nn.init.zeros_(self.modulation.weight[self.width :])  # the gates only
        nn.init.zeros_(self.modulation.bias[self.width :])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, self.modulation(condition))
        return self.image(tokens)


def outer_zero_gates() -> Example:
    with torch.no_grad():
        return SingleModulationDiT(block=SingleModulationBlock).eval(), inputs_for()


class TwiceDiT(OwnDiT):
    """Runs its first block twice."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for block in (*self.blocks, self.blocks[0]):
            tokens = block(tokens, condition)
        return self.image(tokens)


def twice() -> Example:
    return TwiceDiT().eval(), inputs_for()


class ScatteredDiT(OwnDiT):
    """Learned register tokens stand between the image tokens, so these are not contiguous."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        half = self.num_tokens // 2
        register = tokens.new_ones(tokens.shape[0], 1, self.width)
        stream = torch.cat([tokens[:, :half], register, tokens[:, half:]], dim=1)
        for block in self.blocks:
            stream = block(stream, condition)
        return self.image(torch.cat([stream[:, :half], stream[:, half + 1 :]], dim=1))


def scattered() -> Example:
    return ScatteredDiT().eval(), inputs_for()


class PoolBlock(Block):
    """Returns half the tokens, so no token can bypass it."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition)[:, ::2]


class PoolDiT(OwnDiT):
    def image(self, tokens: Tensor) -> Tensor:
        return self.head(tokens)


def pool() -> Example:
    return PoolDiT(block=PoolBlock, depth=1).eval(), inputs_for()


class NoContainer(nn.Module):
    """Two blocks that no list holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.first, self.second = Embedding(16, 6), Block(), Block()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        return self.second(self.first(tokens, condition), condition)


def no_container() -> Example:
    return NoContainer().eval(), inputs_for()


# ---------------------------------------------------------------------- own untraceable ones


class BranchDiT(OwnDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) if float(t.sum()) > 0 else x


def branch() -> Example:
    return BranchDiT().eval(), inputs_for()


class StarDiT(OwnDiT):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, more[0])


# ---------------------------------------------------------------------------- smallest graph


class OneBlock(nn.Module):
    """Nothing but a block, so that its whole graph can be read in a test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([Block(width=8, heads=2)])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.blocks[0](x, condition)


def one_block() -> Example:
    """6 tokens of 8 channels."""
    return OneBlock().eval(), {"x": randn(2, 6, 8), "condition": randn(2, 8, seed=1)}
