"""Tiny pipelines with their real classes, schedulers and autoencoders, and random weights.

Text encoders are left out; prompts come as embeddings. The pipelines' modules name classes of
`transformers` at import and use none of them then, so where that package is missing, names stand in.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import import_utils

from tests.models import randn

PACKAGES = ("transformers", "tokenizers")
VERSION = "4.57.0"


class _Names(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


def pipeline_class(module: str, name: str) -> Any:
    """A pipeline's class, also where `transformers` is not installed."""
    if importlib.util.find_spec("transformers") is not None:
        return getattr(diffusers, name)
    missing = {n: _names(n) for n in PACKAGES if importlib.util.find_spec(n) is None}
    # what all pipelines share is imported as the environment is, without the names
    importlib.import_module("diffusers.pipelines.pipeline_utils")
    before = import_utils._transformers_available, import_utils._transformers_version
    loaders = sys.modules.pop("diffusers.loaders", None)  # its list of names depends on it
    sys.modules.update(missing)
    import_utils._transformers_available = True
    import_utils._transformers_version = VERSION
    try:
        return getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
    finally:
        for package in missing:
            del sys.modules[package]
        import_utils._transformers_available, import_utils._transformers_version = before
        if loaders is not None:
            sys.modules["diffusers.loaders"] = loaders


def _names(package: str) -> types.ModuleType:
    made = _Names(package)
    made.__version__ = VERSION
    made.__path__ = []
    made.__spec__ = importlib.machinery.ModuleSpec(package, None)
    return made


def reloaded(pipe: Any, folder: Path) -> Any:
    """Saved and loaded again."""
    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    return type(pipe).from_pretrained(folder, **absent)


def autoencoder(latent_channels: int = 4, **changes: Any) -> Any:
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes}).eval()


def dit() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    pipe = diffusers.DiTPipeline(transformer.eval(), autoencoder(), diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1], "output_type": "np"}


def pixart() -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class("pixart_alpha.pipeline_pixart_sigma", "PixArtSigmaPipeline")
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = kind(None, None, autoencoder(), transformer.eval(), scheduler)
    mask = torch.ones(1, 5, dtype=torch.long)
    return pipe, {
        "negative_prompt": None,
        "prompt_embeds": randn(1, 5, 12, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": randn(1, 5, 12, seed=2),
        "negative_prompt_attention_mask": mask,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
    }


def sd3() -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class(
        "stable_diffusion_3.pipeline_stable_diffusion_3", "StableDiffusion3Pipeline"
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = kind(transformer.eval(), scheduler, autoencoder(shift_factor=0.0), *[None] * 6)
    return pipe, {
        "prompt_embeds": randn(1, 5, 12, seed=1),
        "negative_prompt_embeds": randn(1, 5, 12, seed=2),
        "pooled_prompt_embeds": randn(1, 10, seed=3),
        "negative_pooled_prompt_embeds": randn(1, 10, seed=4),
        "height": 16,
        "width": 16,
    }


def flux() -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class("flux.pipeline_flux", "FluxPipeline")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = (scheduler, autoencoder(shift_factor=0.0), None, None, None, None)
    return kind(*parts, transformer.eval()), {
        "prompt_embeds": randn(1, 6, 12, seed=1),
        "pooled_prompt_embeds": randn(1, 10, seed=2),
        "height": 32,
        "width": 32,
    }


def wan(**more: Any) -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class("wan.pipeline_wan", "WanPipeline")
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = kind(None, None, vae.eval(), scheduler, wan_transformer(), **more)
    return pipe, {
        "prompt_embeds": randn(1, 5, 12, seed=1),
        "negative_prompt_embeds": randn(1, 5, 12, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def ltx() -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class("ltx.pipeline_ltx", "LTXPipeline")
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    mask = torch.ones(1, 5, dtype=torch.long)
    return kind(scheduler, vae.eval(), None, None, transformer.eval()), {
        "prompt_embeds": randn(1, 5, 12, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": randn(1, 5, 12, seed=2),
        "negative_prompt_attention_mask": mask,
        "height": 64,
        "width": 64,
        "num_frames": 9,
    }


def stable_audio() -> tuple[Any, dict[str, Any]]:
    kind = pipeline_class("stable_audio.pipeline_stable_audio", "StableAudioPipeline")
    projection = pipeline_class(
        "stable_audio.modeling_stable_audio", "StableAudioProjectionModel"
    )
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=12,
        time_proj_dim=8,
        global_states_input_dim=24,
        cross_attention_input_dim=12,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=16,
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0)
    parts = {
        "vae": vae.eval(),
        "projection_model": projection(12, 12, 0, 2).eval(),
        "transformer": transformer.eval(),
    }
    pipe = kind(text_encoder=None, tokenizer=None, scheduler=scheduler, **parts)
    mask = torch.ones(1, 5, dtype=torch.long)
    return pipe, {
        "prompt_embeds": randn(1, 5, 12, seed=1),
        "attention_mask": mask,
        "negative_prompt_embeds": randn(1, 5, 12, seed=2),
        "negative_attention_mask": mask,
        "audio_end_in_s": 2.0,
    }


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "ltx": ltx,
    "stable_audio": stable_audio,
}
