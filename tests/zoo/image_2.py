"""Image transformers of diffusers, J to Z, and two that take other roads (Cosmos 3, UVit).

Where diffusers has one class with several ways to run, an entry's name is ``<class>-<what differs>``.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from tests.zoo import zoo
from tests.zoo.parts import (
    BATCH,
    TEXT,
    Example,
    awake,
    positions,
    some_text,
    some_times,
    text_mask,
)


@zoo("JoyImageEditTransformer3DModel", "image")
def joyimage_edit(size: int) -> Example:
    model = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 1, 8, (8, 12)[size]),
        "timestep": some_times(1000),
        "encoder_hidden_states": some_text(16),
    }


@zoo("JoyImageEditPlusTransformer3DModel", "image")
def joyimage_edit_plus(size: int) -> Example:
    """Patches of the target and of a reference image stand in one padded sequence per sample."""
    model = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    width = (4, 6)[size]
    shapes = [[(1, 4, width), (1, 2, 2)], [(1, 4, width), (1, 2, 1)]]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4 * width + 4, 4, 1, 2, 2),
        "timestep": some_times(1000),
        "encoder_hidden_states": some_text(16),
        "encoder_hidden_states_mask": text_mask().float(),
        "shape_list": shapes,
    }


@zoo("Lumina2Transformer2DModel", "image")
def lumina2(size: int) -> Example:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, (8, 12)[size]),
        "timestep": some_times(),
        "encoder_hidden_states": some_text(16),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
    }


@zoo("LuminaNextDiT2DModel", "image")
def lumina_next(size: int) -> Example:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=16,
    )
    nn.init.normal_(model.pad_token)  # diffusers leaves it uninitialised
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, (8, 12)[size]),
        "timestep": some_times(),
        "encoder_hidden_states": some_text(16),
        "encoder_mask": text_mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
        "cross_attention_kwargs": {},
    }


@zoo("NucleusMoEImageTransformer2DModel", "image")
def nucleus_moe(size: int) -> Example:
    """Dense feed-forwards; the experts are in the next entry."""
    return _nucleus(size, moe_enabled=False)


@zoo("NucleusMoEImageTransformer2DModel-experts", "image")
def nucleus_moe_experts(size: int) -> Example:
    """Each expert takes its share of the tokens that are there, wherever they stand: legal like attention."""
    return _nucleus(
        size,
        moe_enabled=True,
        dense_moe_strategy="all_moe",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )


def _nucleus(size: int, **options: Any) -> Example:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        mlp_ratio=6.0,  # the inner width is rounded down to a multiple of 128
        **options,
    )
    for name, weight in model.named_parameters():
        if ".experts." in name:  # diffusers leaves them uninitialised
            nn.init.normal_(weight, std=0.2)
    width = (4, 6)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4 * width, 8),
        "img_shapes": [(1, 4, width)] * BATCH,
        "encoder_hidden_states": some_text(16),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": some_times(),
    }


@zoo("OmniGenTransformer2DModel", "image")
def omnigen(size: int) -> Example:
    """One stream: prompt with a picture in it (first sample only), timestep, image."""
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        num_layers=2,
        pad_token_id=0,
        vocab_size=50,
        time_step_dim=8,
        rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
    )
    width = (8, 12)[size]
    prompt, tokens = 10, 2 * width  # the picture has 4 patches at 2 to 6 of the prompt
    length = prompt + 1 + tokens
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, width),
        "timestep": some_times(),
        "input_ids": torch.randint(1, 50, (BATCH, prompt)),
        "input_img_latents": [torch.randn(1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 6]]},
        "attention_mask": torch.ones(BATCH, length, length),
        "position_ids": torch.arange(length).repeat(BATCH, 1),
    }


@zoo("OvisImageTransformer2DModel", "image")
def ovis_image(size: int) -> Example:
    model = diffusers.OvisImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    width = (4, 6)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4 * width, 4),
        "encoder_hidden_states": some_text(16),
        "timestep": some_times(),
        "img_ids": positions(1, 4, width),
        "txt_ids": torch.zeros(TEXT, 3),
    }


@zoo("PRXTransformer2DModel", "image")
def prx(size: int) -> Example:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, (8, 12)[size]),
        "timestep": some_times(),
        "encoder_hidden_states": some_text(16),
        "attention_mask": text_mask(),
    }


@zoo("PixArtTransformer2DModel", "image")
def pixart(size: int) -> Example:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, (8, 12)[size]),
        "encoder_hidden_states": some_text(16),
        "timestep": some_times(1000),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": text_mask(),
    }


@zoo("PriorTransformer", "image", refused="image token")
def prior(size: int) -> Example:
    """It denoises one embedding, (batch, width), which is one token among those of the prompt."""
    words = (13, 21)[size]
    model = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=words,
        additional_embeddings=4,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 16),
        "timestep": some_times(1000),
        "proj_embedding": torch.randn(BATCH, 16),
        "encoder_hidden_states": torch.randn(BATCH, words, 16),
        "attention_mask": torch.ones(BATCH, words, dtype=torch.bool),
    }


@zoo("QwenImage21Transformer2DModel", "image")
def qwen_image_21(size: int) -> Example:
    """One stream, text first; each slot of the language model stands for 2 x 2 image tokens."""
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    width = (4, 6)[size]
    slots = torch.zeros(BATCH, TEXT + width, dtype=torch.bool)
    slots[:, TEXT:] = True
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4 * width, 4),
        "encoder_hidden_states": some_text(16),
        "timestep": some_times(),
        "img_shapes": [[(1, 4, width)]] * BATCH,
        "img_mask": slots,
        "encoder_hidden_states_mask": text_mask(),
    }


@zoo("QwenImageTransformer2DModel", "image")
def qwen_image(size: int) -> Example:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    width = (4, 6)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4 * width, 8),
        "encoder_hidden_states": some_text(16),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": some_times(),
        "img_shapes": [[(1, 4, width)]] * BATCH,
    }


@zoo("SD3Transformer2DModel", "image")
def sd3(size: int) -> Example:
    return _sd3(size)


@zoo("SD3Transformer2DModel-3.5", "image")
def sd35(size: int) -> Example:
    return _sd3(size, dual_attention_layers=(0,), qk_norm="rms_norm")


def _sd3(size: int, **options: Any) -> Example:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        **options,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 8, (8, 12)[size]),
        "encoder_hidden_states": some_text(16),
        "pooled_projections": torch.randn(BATCH, 24),
        "timestep": some_times(1000),
    }


@zoo("SanaTransformer2DModel", "image", refused="permut")
def sana(size: int) -> Example:
    """Its feed-forward is a convolution over the image, so tokens meet by their place."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, 4, (4, 6)[size]),
        "encoder_hidden_states": some_text(16),
        "timestep": some_times(1000),
        "encoder_attention_mask": text_mask(),
    }


@zoo("Transformer2DModel", "image")
def transformer_2d(size: int) -> Example:
    """Patches of latents, labels, text in cross-attention; the model uses its first block's embedding."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    side = (8, 12)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, side, side),
        "encoder_hidden_states": some_text(16),
        "timestep": some_times(1000).long(),
        "class_labels": torch.tensor([3, 7]),
    }


@zoo("Transformer2DModel-continuous", "image")
def transformer_2d_continuous(size: int) -> Example:
    """The form in U-Nets: every pixel of a feature map is a token, the map is added at the end."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 8, 4, (4, 6)[size]),
        "encoder_hidden_states": some_text(16),
    }


@zoo("ZImageTransformer2DModel", "image")
def z_image(size: int) -> Example:
    """Samples come as lists; size 0 has 16 tokens, which the model pads to 32."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # diffusers leaves them uninitialised
        nn.init.normal_(getattr(model, name))
    side = (8, 16)[size]
    return awake(model), {
        "x": [torch.randn(4, 1, side, side) for _ in range(BATCH)],
        "t": some_times(),
        "cap_feats": [torch.randn(TEXT, 16) for _ in range(BATCH)],
    }


@zoo("Cosmos3OmniTransformer", "image")
def cosmos3_omni(size: int) -> Example:
    """One packed sequence without a batch axis: a prompt of 3 tokens, then the patches."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=48,
        latent_channel=4,
        latent_patch_size=2,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=[2, 2, 2],
        vocab_size=32,
    )
    words, width = 3, (4, 6)[size]
    tokens = 4 * width
    where = torch.arange(words, words + tokens)
    places = torch.cat([torch.arange(words).repeat(3, 1).T, words + positions(1, 4, width)])
    return awake(model), {
        "input_ids": torch.tensor([5, 9, 2]),
        "text_indexes": torch.arange(words),
        "position_ids": places.T.long(),
        "und_len": words,
        "sequence_length": words + tokens,
        "vision_tokens": [torch.randn(1, 4, 1, 8, 2 * width)],
        "vision_token_shapes": [(1, 4, width)],
        "vision_sequence_indexes": where,
        "vision_mse_loss_indexes": where,
        "vision_timesteps": torch.full((tokens,), 700.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


@zoo("UVit2DModel", "image")
def uvit_2d(size: int) -> Example:
    """Masked diffusion over codes: the sample is (batch, height, width) of integers."""
    model = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=16,
        vocab_size=40,
        codebook_size=32,
        in_channels=16,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=8,
    )
    return awake(model), {
        "input_ids": torch.randint(0, 40, (BATCH, 4, (4, 6)[size])),
        "encoder_hidden_states": some_text(16),
        "pooled_text_emb": torch.randn(BATCH, 16),
        "micro_conds": torch.randint(0, 9, (BATCH, 5)).float(),
    }
