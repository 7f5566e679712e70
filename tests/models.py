"""Small models for the tests: four of diffusers, and hand-written ones with one property each.

Every factory returns ``(model, kwargs)``: a seeded model in evaluation mode and example inputs
of batch 2, whose two samples differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.model_parts import (
    Block,
    Conv1dBlock,
    ConvBlock,
    ConvMlpBlock,
    CrossBlock,
    Embedding,
    FixedGridBlock,
    NestedBlock,
    OwnDiT,
    PoolBlock,
    SingleModulationBlock,
    TableBlock,
    TemporalBlock,
    WindowBlock,
    inputs_for,
    randn,
)

Example = tuple[nn.Module, dict[str, Any]]


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


def rotary_two_heads() -> Example:
    return rotary(heads=2)


def rotary_one_batch() -> Example:
    return rotary(axes="1ND")


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


def convolution_throughout() -> Example:
    return OwnDiT(block=ConvMlpBlock).eval(), inputs_for()


def convolution_1d(zero_gates: bool = False) -> Example:
    return OwnDiT(block=Conv1dBlock, zero_gates=zero_gates).eval(), inputs_for()


def window() -> Example:
    return OwnDiT(block=WindowBlock).eval(), inputs_for()


def temporal() -> Example:
    return OwnDiT(block=TemporalBlock).eval(), inputs_for()


def fixed_grid() -> Example:
    return OwnDiT(block=FixedGridBlock).eval(), inputs_for()


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
