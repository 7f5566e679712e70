"""Image transformers of diffusers, first half of the alphabet and some more.

``size`` 0 is a grid of 4 x 6 image tokens, 1 one of 6 x 8 (square ones where a class needs it). Models
that take tokens instead of pixels get position ids of the same grids.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from torch import Tensor

from tests.zoo import zoo
from tests.zoo.parts import BATCH, TEXT, Example, awake, positions, some_text, text_mask

GRIDS = ((4, 6), (6, 8))
SQUARES = ((4, 4), (8, 8))


def randn(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


def timesteps(high: float = 1.0) -> Tensor:
    return torch.tensor([0.3, 0.7]) * high


# --------------------------------------------------------------------------- pixels in, pixels out


@zoo("AuraFlowTransformer2DModel", "image")
def auraflow(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "encoder_hidden_states": some_text(24),
        "timestep": timesteps(),
    }


@zoo("BriaFibo2Transformer2DModel", "image")
def bria_fibo2(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=64, n_layers=3, n_refiner_layers=2, n_heads=4, cap_feat_dim=24,
        injection_layer_ids=(1,), perceiver_num_layers=2, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4, gist_max_text_len=16,
        axes_dims=(4, 6, 6), axes_lens=(64, 32, 32),
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "timestep": timesteps(),
        "encoder_hidden_states": randn(2, TEXT, 24),
    }


def _size_conditions(*names: str) -> dict[str, Tensor]:
    sizes = torch.tensor([[64.0, 96.0], [48.0, 32.0]])
    return {name: sizes + 8 * index for index, name in enumerate(names)}


@zoo("CogView3PlusTransformer2DModel", "image")
def cogview3_plus(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=20, condition_dim=6, pos_embed_max_size=16, sample_size=16,
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "encoder_hidden_states": some_text(24),
        "timestep": timesteps(1000),
        **_size_conditions("original_size", "target_size", "crop_coords"),
    }


@zoo("CogView4Transformer2DModel", "image")
def cogview4(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=24, time_embed_dim=20, condition_dim=6, pos_embed_max_size=16, sample_size=16,
        rope_axes_dim=(16, 16),
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "encoder_hidden_states": some_text(24),
        "timestep": timesteps(1000),
        **_size_conditions("original_size", "target_size", "crop_coords"),
    }


@zoo("DiTTransformer2DModel", "image")
def dit(size: int) -> Example:
    height, width = SQUARES[size]  # the model takes the root of the token count
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3,
        sample_size=2 * height, num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip
    for block in model.transformer_blocks:
        # in training mode labels are dropped at random, which no comparison survives
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "timestep": timesteps(1000),
        "class_labels": torch.tensor([1, 5]),
    }


@zoo("DreamLiteTransformer2DModel", "image")
def dream_lite(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.DreamLiteTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=3, norm_num_groups=4,
        cross_attention_dim=24,
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(32, height, width),
        "encoder_hidden_states": some_text(24),
        "encoder_attention_mask": text_mask().float(),
    }


@zoo("DualTransformer2DModel", "image")
def dual_transformer(size: int) -> Example:
    height, width = GRIDS[size]
    model = DualTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, norm_num_groups=4,
        cross_attention_dim=24,
    )  # fmt: skip
    model.condition_lengths = [TEXT, 5]
    return awake(model, std=0.2), {
        "hidden_states": randn(32, height, width),
        "encoder_hidden_states": randn(TEXT + 5, 24),
    }


@zoo("ErnieImageTransformer2DModel", "image")
def ernie_image(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=48, in_channels=4,
        out_channels=4, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, height, width),
        "timestep": timesteps(1000),
        "text_bth": some_text(24),
        "text_lens": text_mask().sum(1),
    }


@zoo("GlmImageTransformer2DModel", "image")
def glm_image(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=24, time_embed_dim=20, condition_dim=6, prior_vq_quantizer_codebook_size=40,
    )  # fmt: skip
    prior_token_drop = torch.zeros(BATCH, height * width, dtype=torch.bool)
    prior_token_drop[1] = True
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "encoder_hidden_states": some_text(24),
        "prior_token_id": torch.randint(40, (BATCH, height * width)),
        "prior_token_drop": prior_token_drop,
        "timestep": timesteps(1000),
        **_size_conditions("target_size", "crop_coords"),
    }


@zoo("HiDreamImageTransformer2DModel", "image")
def hidream_image(size: int) -> Example:
    height, width = SQUARES[size]  # others are padded to the largest resolution
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=12,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32), llama_layers=[0, 1, 2, 3],
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "timesteps": timesteps(1000),
        "encoder_hidden_states_t5": some_text(24),
        "encoder_hidden_states_llama3": torch.randn(4, BATCH, 5, 20),
        "pooled_embeds": randn(12),
    }


@zoo("HunyuanDiT2DModel", "image")
def hunyuan_dit(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2,
        sample_size=16, hidden_size=32, num_layers=4, cross_attention_dim=24,
        cross_attention_dim_t5=16, pooled_projection_dim=20, text_len=TEXT, text_len_t5=5,
    )  # fmt: skip
    angles = torch.randn(height * width, 16)
    return awake(model, std=0.2), {
        "hidden_states": randn(4, 2 * height, 2 * width),
        "timestep": timesteps(1000),
        "encoder_hidden_states": some_text(24),
        "text_embedding_mask": text_mask(),
        "encoder_hidden_states_t5": randn(5, 16),
        "text_embedding_mask_t5": torch.ones(BATCH, 5, dtype=torch.bool),
        "image_meta_size": torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@zoo("HunyuanImageTransformer2DModel", "image")
def hunyuan_image(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=2, mlp_ratio=2.0, guidance_embeds=True,
        text_embed_dim=24, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(4, height, width),
        "timestep": timesteps(1000),
        "encoder_hidden_states": some_text(24),
        "encoder_attention_mask": text_mask(),
        "guidance": torch.tensor([3500.0, 4000.0]),
    }


# --------------------------------------------------------------------------- tokens in, tokens out


def _double_and_single(**more: Any) -> dict[str, Any]:
    """Configuration that the FLUX family shares."""
    return {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, **more,
    }  # fmt: skip


def _token_inputs(size: int, axes: int = 3) -> dict[str, Tensor]:
    height, width = GRIDS[size]
    extra = [1] * (axes - 3)
    return {
        "hidden_states": randn(height * width, 8),
        "encoder_hidden_states": some_text(24),
        "timestep": timesteps(),
        "img_ids": positions(1, height, width, *extra),
        "txt_ids": torch.zeros(TEXT, axes),
    }


@zoo("BriaFiboTransformer2DModel", "image")
def bria_fibo(size: int) -> Example:
    model = diffusers.BriaFiboTransformer2DModel(
        **_double_and_single(in_channels=8, text_encoder_dim=20, axes_dims_rope=[4, 6, 6])
    )
    layers = [some_text(20) for _ in range(4)]
    return awake(model, std=0.2), {**_token_inputs(size), "text_encoder_layers": layers}


@zoo("BriaTransformer2DModel", "image")
def bria(size: int) -> Example:
    model = diffusers.BriaTransformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=[4, 6, 6])
    )
    return awake(model, std=0.2), _token_inputs(size)


@zoo("ChromaTransformer2DModel", "image")
def chroma(size: int) -> Example:
    model = diffusers.ChromaTransformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=(4, 6, 6)),
        approximator_num_channels=16, approximator_hidden_dim=20, approximator_layers=2,
    )  # fmt: skip
    inputs = _token_inputs(size)
    image = torch.ones(inputs["hidden_states"].shape[:2])
    mask = torch.cat([text_mask().float(), image], dim=1)
    return awake(model, std=0.2), {**inputs, "attention_mask": mask}


@zoo("Flux2Transformer2DModel", "image")
def flux2(size: int) -> Example:
    model = diffusers.Flux2Transformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=(4, 4, 4, 4)),
        timestep_guidance_channels=16,
    )  # fmt: skip
    return awake(model, std=0.2), {
        **_token_inputs(size, axes=4),
        "guidance": torch.tensor([3.5, 4.0]),
    }


@zoo("Flux3Transformer2DModel", "image")
def flux3(size: int) -> Example:
    model = diffusers.Flux3Transformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=(4, 4, 4, 4)),
        cond_in_channels=6, timestep_channels=16,
    )  # fmt: skip
    return awake(model, std=0.2), {
        **_token_inputs(size, axes=4),
        "image_cond_hidden_states": randn(10, 6),
        "image_cond_ids": positions(1, 2, 5, 1, first=1),
    }


@zoo("FluxTransformer2DModel", "image")
def flux(size: int) -> Example:
    model = diffusers.FluxTransformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=(4, 6, 6)),
        pooled_projection_dim=20, guidance_embeds=True,
    )  # fmt: skip
    return awake(model, std=0.2), {
        **_token_inputs(size),
        "pooled_projections": randn(20),
        "guidance": torch.tensor([3.5, 4.0]),
    }


@zoo("LongCatImageTransformer2DModel", "image")
def longcat_image(size: int) -> Example:
    model = diffusers.LongCatImageTransformer2DModel(
        **_double_and_single(in_channels=8, axes_dims_rope=[4, 6, 6]), pooled_projection_dim=20
    )
    return awake(model, std=0.2), _token_inputs(size)


@zoo("Krea2Transformer2DModel", "image")
def krea2(size: int) -> Example:
    height, width = GRIDS[size]
    model = diffusers.Krea2Transformer2DModel(
        in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=24,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=40, num_layerwise_text_blocks=2, num_refiner_text_blocks=2,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return awake(model, std=0.2), {
        "hidden_states": randn(height * width, 8),
        "encoder_hidden_states": randn(TEXT, 3, 24),
        "timestep": timesteps(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(1, height, width)]),
        "encoder_attention_mask": text_mask(),
    }


@zoo("Ideogram4Transformer2DModel", "image")
def ideogram4(size: int) -> Example:
    from diffusers.models.transformers.transformer_ideogram4 import (
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    height, width = GRIDS[size]
    tokens = TEXT + height * width  # one packed sequence: text, then image
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=48, adaln_dim=20, llm_features_dim=24, mrope_section=(4, 2, 2),
    )  # fmt: skip
    indicator = torch.full((BATCH, tokens), OUTPUT_IMAGE_INDICATOR)
    indicator[:, :TEXT] = LLM_TOKEN_INDICATOR
    segments = torch.zeros(BATCH, tokens, dtype=torch.long)
    segments[:, :TEXT][~text_mask()] = -1  # padding sees only padding
    ids = torch.cat([positions(TEXT, 1, 1), positions(1, height, width, first=TEXT)]).long()
    return awake(model, std=0.2), {
        "hidden_states": randn(tokens, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": randn(tokens, 24),
        "position_ids": ids.expand(BATCH, -1, -1),
        "segment_ids": segments,
        "indicator": indicator,
    }
