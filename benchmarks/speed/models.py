"""Untrained models of any size: speed and memory depend on shapes, not on what was learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from diffcr_compile.capture import capture
from diffcr_compile.config import RoutingConfig
from diffcr_compile.legality import find_blocks
from diffcr_compile.program import Program
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from diffcr_compile.stages import routed_program

PATCH, CHANNELS = 2, 4
TEXT_TOKENS, TEXT_WIDTH = 32, 256
LEGALITY_TOKENS = 64


def head_width(width: int) -> int:
    return 72 if width % 72 == 0 and width > 1000 else 64


def new_dit(width: int, blocks: int, tokens: int) -> nn.Module:
    """A class-conditional DiT on `tokens` tokens, a square number."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=width // head_width(width),
        attention_head_dim=head_width(width),
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=blocks,
        sample_size=side_of(tokens),
        patch_size=PATCH,
        num_embeds_ada_norm=10,
    )
    return model.eval()


def dit_inputs(tokens: int, batch: int) -> dict[str, Any]:
    side = side_of(tokens)
    return {
        "hidden_states": torch.randn(
            batch, CHANNELS, side, side, generator=torch.Generator().manual_seed(0)
        ),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 10,
    }


def new_pixart(
    width: int, blocks: int, tokens: int, text_width: int = TEXT_WIDTH
) -> nn.Module:
    """A text-conditional DiT; 28 blocks of width 1,152 with text of width 4,096 have 611 M parameters."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=width // head_width(width),
        attention_head_dim=head_width(width),
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=blocks,
        cross_attention_dim=width,
        caption_channels=text_width,
        sample_size=side_of(tokens),
        patch_size=PATCH,
        use_additional_conditions=False,
    )
    return model.eval()


def pixart_inputs(tokens: int, batch: int, text_width: int = TEXT_WIDTH) -> dict[str, Any]:
    side, generator = side_of(tokens), torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, side, side, generator=generator),
        "encoder_hidden_states": torch.randn(
            batch, TEXT_TOKENS, text_width, generator=generator
        ),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def side_of(tokens: int) -> int:
    """Side of the latent whose patches are that many tokens."""
    return PATCH * round(tokens**0.5)


def schedule_of(routed: Program, columns: list[list[float]]) -> TokenSchedule:
    """Keep ratios, a list over blocks for each timestep bucket, as kept tokens."""
    blocks = routed.blocks
    return TokenSchedule(
        {
            spec.name: tuple(max(1, round(column[i] * spec.num_tokens)) for column in columns)
            for i, spec in enumerate(blocks)
        },
        {spec.name: spec.num_tokens for spec in blocks},
        TimestepBuckets.even(len(columns)),
    )


def mixed_columns(blocks: int, buckets: int) -> list[list[float]]:
    """Different keep ratios in every bucket and block, from 3/8 to 7/8; the first block keeps all."""
    return [
        [1.0] + [(3 + (block + bucket) % 5 + bucket / 16) / 8 for block in range(1, blocks)]
        for bucket in range(buckets)
    ]


def routed_dit(width: int, blocks: int, tokens: int, batch: int) -> tuple[nn.Module, Program]:
    """A DiT and its ROUTED program. Its blocks are examined at 64 tokens, where that takes seconds."""
    small = new_dit(width, blocks, LEGALITY_TOKENS)
    found = find_blocks(small, (), dit_inputs(LEGALITY_TOKENS, 2))
    specs = [dataclasses.replace(spec, num_tokens=tokens) for spec in found.blocks]
    model = new_dit(width, blocks, tokens)
    captured = capture(model, (), dit_inputs(tokens, batch), specs, (), found.sample)
    return model, routed_program(captured, RoutingConfig(), 0)
