"""Audio transformers of diffusers, and the one for molecules."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import (
    MiniMaxMusic3RVQDepthDecoder,
)
from diffusers.models.transformers.transformer_rfd4_proteina import RFD4ProteinaTransformer

from tests.zoo import zoo
from tests.zoo.parts import BATCH, TEXT, Example, awake, some_text, some_times, text_mask


@zoo("AceStepTransformer1DModel", "audio")
def ace_step(size: int) -> Example:
    """Even layers attend to 5 neighbours by a mask, odd ones to all."""
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=5,
    )
    frames = (32, 48)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, frames, 8),
        "timestep": some_times(),
        "timestep_r": torch.tensor([0.6, 0.3]),
        "encoder_hidden_states": some_text(32),
        "context_latents": torch.randn(BATCH, frames, 16),
    }


@zoo("LongCatAudioDiTTransformer", "audio")
def longcat_audio(size: int) -> Example:
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=16, latent_dim=8
    )
    frames = (16, 24)[size]
    present = torch.ones(BATCH, frames, dtype=torch.bool)
    present[1, -3:] = False  # the second sound is shorter
    return awake(model), {
        "hidden_states": torch.randn(BATCH, frames, 8),
        "encoder_hidden_states": some_text(16),
        "encoder_attention_mask": text_mask(),
        "timestep": some_times(),
        "attention_mask": present,
        "latent_cond": torch.randn(BATCH, frames, 8),
    }


@zoo("MiniMaxMusic3Transformer1DModel", "audio")
def minimax_music(size: int) -> Example:
    """The timestep is the first token of the stream."""
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=8,
    )
    frames = (16, 24)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 8, frames),
        "timestep": some_times(),
        "encoder_hidden_states": torch.randn(BATCH, frames, 16),
    }


@zoo("MiniMaxMusic3RVQDepthDecoder", "audio", refused="permut")
def minimax_depth_decoder(size: int) -> Example:
    """Not a denoiser: it predicts the next code from the last ones, with causal attention."""
    model = MiniMaxMusic3RVQDepthDecoder(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        audio_vocab_size=16,
        num_codebooks=4,
    )
    return awake(model), {"inputs_embeds": torch.randn(BATCH, (8, 14)[size], 32)}


@zoo("StableAudio3DiTModel", "audio")
def stable_audio_3(size: int) -> Example:
    """Memory tokens first; every block adds a local condition to the tokens behind them."""
    model = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
    )
    frames = (16, 24)[size]
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 8, frames),
        "timestep": some_times(),
        "encoder_hidden_states": some_text(16),
        "global_hidden_states": torch.randn(BATCH, 12),
        "encoder_attention_mask": text_mask(),
        "local_add_cond": torch.randn(BATCH, 5, frames),
    }


@zoo("StableAudioDiTModel", "audio")
def stable_audio(size: int) -> Example:
    """Duration and timestep are the first token; the rotary table is an input."""
    model = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=16,
        global_states_input_dim=12,
        time_proj_dim=16,
    )
    frames = (16, 24)[size]
    table = get_1d_rotary_pos_embed(8, frames + 1, use_real=True, repeat_interleave_real=False)
    return awake(model), {
        "hidden_states": torch.randn(BATCH, 8, frames),
        "timestep": some_times(),
        "encoder_hidden_states": some_text(16),
        "global_hidden_states": torch.randn(BATCH, 1, 12),
        "rotary_embedding": table,
    }


@zoo("T5FilmDecoder", "audio")
def t5_film(size: int) -> Example:
    """Denoises a spectrogram; notes and the music so far are encoded elsewhere."""
    frames = (16, 24)[size]
    model = diffusers.T5FilmDecoder(
        input_dims=8,
        targets_length=frames,
        d_model=32,
        num_layers=2,
        num_heads=2,
        d_kv=16,
        d_ff=48,
    )
    notes = (some_text(32), text_mask().float())
    before = (torch.randn(BATCH, TEXT + 4, 32), torch.ones(BATCH, TEXT + 4))
    return awake(model), {
        "encodings_and_masks": [notes, before],
        "decoder_input_tokens": torch.randn(BATCH, frames, 8),
        "decoder_noise_time": some_times(),
    }


@zoo("RFD4ProteinaTransformer", "3d")
def rfd4_proteina(size: int) -> Example:
    """One token per residue, and a representation of each pair, which between some layers is updated."""
    model = RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=32,
        nheads=4,
        dim_cond=16,
        pair_repr_dim=12,
        latent_dim=8,
        token_type_emb_dim=4,
        t_emb_dim=16,
        seq_sep_dim=6,
        xt_pair_dist_dim=5,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair", "token_bond_path_length"),
        tri_mult_c=16,
        num_sequence_classes=9,
    )
    residues = (16, 24)[size]
    place = torch.arange(residues)
    real = torch.ones(BATCH, residues, dtype=torch.bool)
    real[1, -3:] = False  # the second molecule is shorter
    return awake(model), {
        "bb_ca": torch.randn(BATCH, residues, 3),
        "local_latents": torch.randn(BATCH, residues, 8),
        "bb_ca_time": some_times(),
        "local_latents_time": torch.tensor([0.5, 0.9]),
        "padding_mask": real,
        "token_type": torch.randint(0, 7, (BATCH, residues)),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(BATCH, residues, dtype=torch.bool),
            "supports_local_latent": torch.ones(BATCH, residues, dtype=torch.bool),
            "molecule_iid": (place // 6).repeat(BATCH, 1),
            "token_bond_path_length": (place[:, None] - place).abs().repeat(BATCH, 1, 1),
        },
    }
