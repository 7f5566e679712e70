"""Video transformers of diffusers, first half: AllegroTransformer3DModel to LTX2VideoTransformer3DModel.

Widths, depths and videos are tiny; everything else is as in the published configurations, so
that what a block is called with (tables, masks, integers) is what it gets in real use.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as library
from torch import Tensor, nn

from tests.zoo import zoo
from tests.zoo.parts import BATCH, Example, asleep

TEXT = 6  # text tokens: no other size here is 6
TEXT_WIDTH = 20


def make(name: str, **config: Any) -> nn.Module:
    """The model, awake; its noise leaves the global generator where it was."""
    model: nn.Module = getattr(library, name)(**config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in asleep(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def video(size: int, channels: int = 4) -> Tensor:
    """Latents (batch, channels, frames, height, width): with patches of 1 x 2 x 2, 32 or 48 tokens."""
    return torch.randn(BATCH, channels, 2, 8, (8, 12)[size])


def text(width: int = TEXT_WIDTH) -> Tensor:
    return torch.randn(BATCH, TEXT, width)


def text_mask() -> Tensor:
    """The second sample has a shorter text."""
    return torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2])


def timestep() -> Tensor:
    return torch.tensor([900, 400])


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (tokens, width) as pipelines pass them, each frequency twice."""
    angles = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(width // 2)
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


@zoo("AllegroTransformer3DModel", "video")
def allegro(size: int) -> Example:
    model = make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=TEXT_WIDTH,
    )
    latents = video(size)
    # As the pipeline passes them: a table per axis, and (1, tokens) integers that point into it.
    axes = (2, 4, (4, 6)[size])
    tables = tuple(rotary(length, 8) for length in axes)
    grid = torch.cartesian_prod(*(torch.arange(length) for length in axes)).T[:, None]
    return model, {
        "hidden_states": latents,
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "attention_mask": torch.ones(BATCH, *latents.shape[2:]),
        "encoder_attention_mask": text_mask(),
        "image_rotary_emb": (tables, tuple(grid)),
    }


@zoo("AnyFlowTransformer3DModel", "video")
def any_flow(size: int) -> Example:
    model = make("AnyFlowTransformer3DModel", **_any_flow_config())
    latents = video(size).transpose(1, 2)
    return model, {
        "hidden_states": latents,
        "timestep": torch.tensor([[900.0, 900.0], [400.0, 400.0]]),
        "r_timestep": torch.tensor([[700.0, 700.0], [100.0, 100.0]]),
        "encoder_hidden_states": text(),
    }


# Its attention mask is a BlockMask: made for the full token count, causal over chunks of frames.
@zoo("AnyFlowFARTransformer3DModel", "video")
def any_flow_far(size: int) -> Example:
    model = make(
        "AnyFlowFARTransformer3DModel",
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=2,
        **_any_flow_config(),
    )
    latents = torch.randn(BATCH, 4, 4, 8, (8, 12)[size]).transpose(1, 2)
    return model, {
        "hidden_states": latents,
        "timestep": torch.tensor([[900.0] * 4, [400.0] * 4]),
        "r_timestep": torch.tensor([[700.0] * 4, [100.0] * 4]),
        "encoder_hidden_states": text(),
        "chunk_partition": [2, 1, 1],
    }


def _any_flow_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }


@zoo("ChronoEditTransformer3DModel", "video")
def chrono_edit(size: int) -> Example:
    model = make(
        "ChronoEditTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        image_dim=14,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": video(size),
        "timestep": timestep(),
        # its blocks count on 512 text tokens
        "encoder_hidden_states": torch.randn(BATCH, 512, TEXT_WIDTH),
        "encoder_hidden_states_image": torch.randn(BATCH, 5, 14),
    }


@zoo("CogVideoXTransformer3DModel", "video")
def cogvideox(size: int) -> Example:
    # Size 0 is another size than the model's own, so it makes its position table while it runs.
    model = make(
        "CogVideoXTransformer3DModel", sample_width=12, sample_frames=5, **_cogvideox_config()
    )
    return model, {
        "hidden_states": video(size).transpose(1, 2),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
    }


@zoo("CogVideoXTransformer3DModel-1.5", "video")
def cogvideox_1_5(size: int) -> Example:
    model = make(
        "CogVideoXTransformer3DModel",
        patch_size_t=2,
        patch_bias=False,
        ofs_embed_dim=18,
        sample_width=12,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
        **_cogvideox_config(),
    )
    latents = torch.randn(BATCH, 4, 4, 8, (8, 12)[size]).transpose(1, 2)
    return model, {
        "hidden_states": latents,
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "ofs": torch.tensor([2.0, 2.0]),
        "image_rotary_emb": rotary((32, 48)[size], 16),
    }


def _cogvideox_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 18,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 2,
        "sample_height": 8,
        "max_text_seq_length": TEXT,
    }


@zoo("ConsisIDTransformer3DModel", "video")
def consis_id(size: int) -> Example:
    model = make(
        "ConsisIDTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=18,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=(8, 12)[size],
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=10,
        LFE_vit_dim=14,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=5,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )
    return model, {
        "hidden_states": video(size).transpose(1, 2),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "image_rotary_emb": rotary((32, 48)[size], 16),
        "id_cond": torch.randn(BATCH, 10),
        "id_vit_hidden": [torch.randn(BATCH, 7, 14) for _ in range(2)],
    }


# The padding mask is left out in all three: models with it need torchvision.
@zoo("CosmosTransformer3DModel", "video")
def cosmos(size: int) -> Example:
    model = make("CosmosTransformer3DModel", in_channels=4, **_cosmos_config())
    return model, {
        "hidden_states": video(size),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "fps": 30,
    }


@zoo("CosmosTransformer3DModel-video2world", "video")
def cosmos_video_to_world(size: int) -> Example:
    """As in Cosmos-Predict2: a timestep per frame, no learned position table."""
    model = make(
        "CosmosTransformer3DModel",
        in_channels=5,
        **{**_cosmos_config(), "extra_pos_embed_type": None},
    )
    latents = video(size)
    condition = torch.zeros(BATCH, 1, *latents.shape[2:])
    condition[:, :, 0] = 1
    times = torch.tensor([[0.1, 0.9], [0.1, 0.4]])[:, None, :, None, None]
    return model, {
        "hidden_states": latents,
        "timestep": times,
        "encoder_hidden_states": text(),
        "condition_mask": condition,
        "fps": 16,
    }


@zoo("CosmosTransformer3DModel-image-context", "video")
def cosmos_image_context(size: int) -> Example:
    """As in Cosmos-Transfer2.5: text and image context as a tuple, residuals of a control network."""
    model = make(
        "CosmosTransformer3DModel",
        in_channels=4,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=18,
        encoder_hidden_states_channels=TEXT_WIDTH,
        controlnet_block_every_n=1,
        img_context_dim_in=10,
        img_context_num_tokens=5,
        img_context_dim_out=24,
        **{**_cosmos_config(), "extra_pos_embed_type": None},
    )
    return model, {
        "hidden_states": video(size),
        "timestep": timestep(),
        "encoder_hidden_states": (text(18), torch.randn(BATCH, 5, 10)),
        "block_controlnet_hidden_states": [
            torch.randn(BATCH, (32, 48)[size], 24) for _ in range(2)
        ],
        "fps": 16,
    }


def _cosmos_config() -> dict[str, Any]:
    return {
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,
    }


@zoo("EasyAnimateTransformer3DModel", "video")
def easy_animate(size: int) -> Example:
    model = make(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=18,
        add_norm_text_encoder=True,
        text_embed_dim=TEXT_WIDTH,
    )
    return model, {
        "hidden_states": video(size),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "inpaint_latents": video(size),
    }


@zoo("HeliosTransformer3DModel", "video")
def helios(size: int) -> Example:
    model = make("HeliosTransformer3DModel", **_helios_config())
    return model, _helios_inputs(size)


@zoo("HeliosTransformer3DModel-amplified-history", "video")
def helios_amplified(size: int) -> Example:
    """The keys of the history are scaled, so each block depends on where the history ends."""
    model = make(
        "HeliosTransformer3DModel",
        **{**_helios_config(), "is_amplify_history": True, "guidance_cross_attn": False},
    )
    return model, _helios_inputs(size)


def _helios_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
        "rope_dim": (4, 4, 4),
    }


def _helios_inputs(size: int) -> dict[str, Any]:
    latents = video(size)
    height, width = latents.shape[3:]

    def frames(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count).expand(BATCH, -1)

    def history(count: int) -> Tensor:
        return torch.randn(BATCH, 4, count, height, width)

    return {
        "hidden_states": latents,
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "indices_hidden_states": frames(7, 2),
        "indices_latents_history_short": frames(6, 1),
        "indices_latents_history_mid": frames(4, 2),
        "indices_latents_history_long": frames(0, 4),
        "latents_history_short": history(1),
        "latents_history_mid": history(2),
        "latents_history_long": history(4),
    }


# Text to video says so by image embeddings of zeros; the model branches on that.
@zoo("HunyuanVideo15Transformer3DModel", "video")
def hunyuan_video_1_5(size: int) -> Example:
    model, inputs = hunyuan_video_1_5_from_image(size)
    return model, {**inputs, "image_embeds": torch.zeros(BATCH, 3, 10)}


@zoo("HunyuanVideo15Transformer3DModel-image-to-video", "video")
def hunyuan_video_1_5_from_image(size: int) -> Example:
    model = make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=18,
        image_embed_dim=10,
        rope_axes_dim=(4, 4, 4),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 9, 2, 4, (4, 6)[size]),
        "timestep": timestep().float(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": torch.randn(BATCH, 5, 18),
        "encoder_attention_mask_2": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
        "image_embeds": torch.randn(BATCH, 3, 10),
    }


@zoo("HunyuanVideoFramepackTransformer3DModel", "video")
def hunyuan_video_framepack(size: int) -> Example:
    model = make(
        "HunyuanVideoFramepackTransformer3DModel",
        has_image_proj=True,
        image_proj_dim=10,
        has_clean_x_embedder=True,
        **_hunyuan_config(),
    )
    latents = video(size)

    def history(frames: int) -> Tensor:
        return torch.randn(BATCH, 4, frames, *latents.shape[3:])

    return model, {
        "hidden_states": latents,
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": torch.randn(BATCH, 14),
        "image_embeds": torch.randn(BATCH, 3, 10),
        "indices_latents": torch.arange(8, 10),
        "guidance": torch.tensor([6000.0, 5000.0]),
        "latents_clean": history(2),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": history(2),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": history(4),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


@zoo("HunyuanVideoTransformer3DModel", "video")
def hunyuan_video(size: int) -> Example:
    model = make("HunyuanVideoTransformer3DModel", **_hunyuan_config())
    return model, _hunyuan_inputs(size, 4)


@zoo("HunyuanVideoTransformer3DModel-latent-concat", "video")
def hunyuan_video_latent_concat(size: int) -> Example:
    model = make(
        "HunyuanVideoTransformer3DModel",
        image_condition_type="latent_concat",
        **{**_hunyuan_config(), "in_channels": 9, "guidance_embeds": False},
    )
    inputs = _hunyuan_inputs(size, 9)
    del inputs["guidance"]
    return model, inputs


# Each block modulates the tokens of the first frame, told by an integer, in another way.
@zoo(
    "HunyuanVideoTransformer3DModel-token-replace",
    "video",
    refused="permuting its image tokens",
)
def hunyuan_video_token_replace(size: int) -> Example:
    model = make(
        "HunyuanVideoTransformer3DModel",
        image_condition_type="token_replace",
        **_hunyuan_config(),
    )
    return model, _hunyuan_inputs(size, 4)


def _hunyuan_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": 14,
        "rope_axes_dim": (4, 4, 4),
    }


def _hunyuan_inputs(size: int, channels: int) -> dict[str, Any]:
    return {
        "hidden_states": video(size, channels),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": torch.randn(BATCH, 14),
        "guidance": torch.tensor([6000.0, 5000.0]),
    }


@zoo("Kandinsky5Transformer3DModel", "video")
def kandinsky_5(size: int) -> Example:
    model = make(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=14,
        time_dim=18,
        out_visual_dim=4,
        model_dim=24,
        ff_dim=40,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=True,
    )
    latents = torch.randn(BATCH, 2, 8, (8, 12)[size], 9)
    return model, {
        "hidden_states": latents,
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "pooled_projections": torch.randn(BATCH, 14),
        "visual_rope_pos": tuple(torch.arange(n) for n in (2, 4, (4, 6)[size])),
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@zoo("Kandinsky6Transformer3DModel", "video")
def kandinsky_6(size: int) -> Example:
    model = make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=14,
        time_dim=18,
        model_dim=24,
        ff_dim=40,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        in_audio_dim=5,
        out_audio_dim=5,
        model_dim_a=24,
        ca_rope=True,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 2, 8, (8, 12)[size], 9),
        "encoder_hidden_states": text(),
        "pooled_projections": torch.randn(BATCH, 14),
        "timestep": timestep(),
        "audio_hidden_states": torch.randn(BATCH, 10, 5),
    }


# Sparse attention over tiles of 8 x 8 tokens, with a BlockMask that is made for all of them.
@zoo("Kandinsky6SRTransformer3DModel", "video")
def kandinsky_6_sr(size: int) -> Example:
    model = make(
        "Kandinsky6SRTransformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=18,
        model_dim=24,
        ff_dim=40,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        nabla_window=(1, 1, 1),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 2, 8, (8, 16)[size], 9),
        "timestep": timestep(),
    }


@zoo("LTXVideoTransformer3DModel", "video")
def ltx_video(size: int) -> Example:
    model = make(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    height, width = 4, (4, 6)[size]
    return model, {
        "hidden_states": torch.randn(BATCH, 2 * height * width, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask(),
        "num_frames": 2,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@zoo("LTX2VideoTransformer3DModel", "video")
def ltx_2_video(size: int) -> Example:
    model = make("LTX2VideoTransformer3DModel", **_ltx_2_config())
    return model, _ltx_2_inputs(size)


@zoo("LTX2VideoTransformer3DModel-2.3", "video")
def ltx_2_3_video(size: int) -> Example:
    """Gated attention, modulated text, split rotary tables and a timestep per video token."""
    model = make(
        "LTX2VideoTransformer3DModel",
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        rope_type="split",
        **_ltx_2_config(),
    )
    inputs = _ltx_2_inputs(size)
    times = torch.tensor([900.0, 400.0])
    inputs["timestep"] = times[:, None].expand(-1, (32, 48)[size]).clone()
    inputs["timestep"][:, :4] = 0.0  # conditioned tokens are clean
    return model, {
        **inputs,
        "audio_timestep": times,
        "sigma": times,
        "use_cross_timestep": True,
    }


def _ltx_2_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": 5,
        "audio_out_channels": 5,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": TEXT_WIDTH,
    }


def _ltx_2_inputs(size: int) -> dict[str, Any]:
    height, width = 4, (4, 6)[size]
    return {
        "hidden_states": torch.randn(BATCH, 2 * height * width, 4),
        "audio_hidden_states": torch.randn(BATCH, 10, 5),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask(),
        "audio_encoder_attention_mask": text_mask(),
        "num_frames": 2,
        "height": height,
        "width": width,
        "fps": 25.0,
        "audio_num_frames": 10,
    }
