"""Video diffusion transformers of diffusers, second half of the alphabet (Latte to WanVACE)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from tests.zoo import zoo
from tests.zoo.parts import BATCH, Example, awake

TEXT = 5  # text tokens
TEXT_WIDTH = 24


def video(size: int, channels: int, frames: int | None = None) -> Tensor:
    """Latents (2, channels, frames, 4, 8): 16 or 32 tokens with patches of (1, 2, 2)."""
    return torch.randn(BATCH, channels, frames or (2, 4)[size], 4, 8)


def text() -> Tensor:
    return torch.randn(BATCH, TEXT, TEXT_WIDTH)


def text_mask() -> Tensor:
    """Padding differs between the samples."""
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def timestep() -> Tensor:
    return torch.tensor([900, 400])


@zoo("LatteTransformer3DModel", "video")
def latte(size: int) -> Example:
    frames = (4, 6)[size]  # its table of frames is as long as the video
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=frames,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, frames, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
    }


@zoo("MiniMaxH3Transformer3DModel", "video")
def minimax_h3(size: int) -> Example:
    tokens, sounds = (16, 32)[size], 6
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=8,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=24,
        rope_freq_dim=4,
    )
    length = TEXT + tokens + sounds  # one packed sequence: text, video, sound
    texts, pictures, audios = torch.arange(length).split([TEXT, tokens, sounds])
    tags = torch.tensor([1] * TEXT + [0] * tokens + [2] * sounds)
    at = torch.arange(tokens)
    positions = torch.zeros(length, 3)
    positions[texts, 0] = torch.arange(TEXT).float()
    positions[pictures] = torch.stack([at // 8, at // 4 % 2, at % 4], 1).float() + TEXT
    positions[audios, 0] = torch.arange(sounds) / 3 + TEXT
    return awake(model), {
        "hidden_states": torch.randn(BATCH, tokens, 16),
        "audio_hidden_states": torch.randn(BATCH, sounds, 8),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.9, 1.0, 0.4]),  # one layout and its noise for all samples
        "timestep_indices": tags,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": pictures,
        "audio_indices": audios,
        "text_indices": texts,
    }


@zoo("MochiTransformer3DModel", "video")
def mochi(size: int) -> Example:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return awake(model), {
        "hidden_states": video(size, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask().bool(),
    }


@zoo("MotifVideoTransformer3DModel", "video")
def motif_video(size: int) -> Example:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return awake(model), {
        "hidden_states": video(size, 9),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
    }


@zoo("SanaVideoTransformer3DModel", "video", refused="mixes tokens by their position")
def sana_video(size: int) -> Example:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
        rope_max_seq_len=32,
    )
    return awake(model), {
        "hidden_states": video(size, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask(),
    }


@zoo("SanaWMTransformer3DModel", "video", refused="mixes tokens by their position")
def sana_wm(size: int) -> Example:
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=4,
        hidden_size=48,
        num_attention_heads=3,
        softmax_every_n=2,
        linear_head_dim=16,
        chunk_plucker_channels=6,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.0,
    )
    frames = (2, 4)[size]
    cameras = torch.cat([torch.eye(4).flatten(), torch.tensor([3.0, 3.0, 1.5, 1.5])])
    cameras = cameras.repeat(BATCH, frames, 1)  # camera to world (4 x 4), focus, centre
    cameras[..., 3] = torch.rand(BATCH, frames)
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 4, frames, 3, 3),
        "timestep": timestep().float().view(BATCH, 1, 1).expand(BATCH, 1, frames).clone(),
        "encoder_hidden_states": text()[:, None],
        "encoder_attention_mask": text_mask(),
        "camera_conditions": cameras,
        "chunk_plucker": torch.randn(BATCH, 6, frames, 3, 3),
    }


@zoo("SanaWMLTX2RefinerTransformer3DModel", "video")
def sana_wm_refiner(size: int) -> Example:
    frames = (2, 4)[size]
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    rotary = model.build_rotary_emb_for_absolute_positions(
        BATCH, list(range(frames)), 2, 4, torch.device("cpu"), fps=24.0
    )
    noise = torch.tensor([900.0, 400.0])[:, None].repeat(1, frames * 8)
    noise[:, :8] = 0.0  # the first frame is given
    return awake(model), {
        "hidden_states": torch.randn(BATCH, frames * 8, 4),
        "encoder_hidden_states": text(),
        "timestep": noise,
        "video_rotary_emb": rotary,
        "encoder_attention_mask": text_mask(),
    }


@zoo("SkyReelsV2Transformer3DModel", "video")
def skyreels_v2(size: int) -> Example:
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return awake(model), {
        "hidden_states": video(size, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
    }


@zoo("TransformerTemporalModel", "video")
def temporal(size: int) -> Example:
    frames = (4, 8)[size]
    model = diffusers.models.transformers.TransformerTemporalModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        num_layers=2,
        norm_num_groups=4,
    )
    return awake(model), {
        "hidden_states": torch.randn(BATCH * frames, 8, 4, 4),
        "num_frames": frames,
    }


class ReferencePass(nn.Module):
    """The adapter a user writes for a model that fills an object: tensors in, tensors out."""

    def __init__(self, model: diffusers.WanAnimate2Transformer3DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: list[Tensor], **inputs: Any) -> tuple[Tensor, ...]:
        cache = WanAnimate2KVCache(len(self.model.blocks))
        (sample,) = self.model(
            hidden_states, kv_cache=cache, kv_cache_mode="extract", return_dict=False, **inputs
        )
        stored = [tensor for layer in cache.layer_caches for tensor in layer.get()]
        return (*sample, *stored)


@zoo("WanAnimate2Transformer3DModel", "video")
def wan_animate_2(size: int) -> Example:
    # In an adapter of ten lines, because the model writes into an object that it is given. The pass over the reference video: the other one compiles a FlexAttention mask. The rotation
    # follows the grid sizes inside of a block in both.
    frames = (2, 4)[size]
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=TEXT,
        in_dim=12,
        dim=24,
        ffn_dim=32,
        freq_dim=32,
        text_dim=TEXT_WIDTH,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    return ReferencePass(awake(model)).eval(), {
        "hidden_states": list(torch.randn(BATCH, 4, frames, 4, 8)),
        "timestep": timestep(),
        "encoder_hidden_states": list(text()),
        "condition_latents": list(torch.randn(BATCH, 8, frames, 4, 8)),
        "seq_len": frames * 8,
        "offset_grid_sizes": torch.tensor([[frames, 2, 4]] * BATCH),
    }


@zoo("WanAnimateTransformer3DModel", "video")
def wan_animate(size: int) -> Example:
    frames = (2, 3)[size]  # one more for the reference picture
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return awake(model), {
        "hidden_states": video(size, 12, frames + 1),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_image": torch.randn(BATCH, 3, 8),
        "pose_hidden_states": video(size, 4, frames),
        "face_pixel_values": torch.randn(BATCH, 3, 4 * frames - 3, 16, 16),
    }


@zoo("WanTransformer3DModel", "video")
def wan(size: int) -> Example:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return awake(model), {
        "hidden_states": video(size, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
    }


@zoo("WanVACETransformer3DModel", "video")
def wan_vace(size: int) -> Example:
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    )
    return awake(model), {
        "hidden_states": video(size, 4),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "control_hidden_states": video(size, 6),
    }
