"""The reference DiT: class-conditional, Fashion-MNIST, 32 x 32 pixels, 256 tokens, 2.8 M parameters."""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel

from diffcr_compile.vector_math import settle_vector_math

NULL_LABEL = 10
REFERENCE_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def new_reference_dit(sample_size: int = 32, in_channels: int = 1) -> DiTTransformer2DModel:
    """A reference DiT with fresh weights, in training mode.

    Args:
        sample_size: pixels a side.
        in_channels: more than 1 for a condition beside the noisy image; the output always has 1.

    Every block of this diffusers class owns a label embedder that drops labels on its own in
    training mode; that is switched off, so that all blocks of one forward see the same label.
    """
    settle_vector_math()  # its position table is computed here
    changed = {"sample_size": sample_size, "in_channels": in_channels}
    model = DiTTransformer2DModel(**{**REFERENCE_CONFIG, **changed})
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model
