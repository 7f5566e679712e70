"""What the hard tests work on: a small DiT of diffusers with two timestep buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import diffcr_compile as dcr
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule


def tiny_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Two blocks, 16 tokens; seeded."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1,
        num_layers=2, sample_size=8, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([800, 800]),
        "class_labels": torch.tensor([1, 2]),
    }  # fmt: skip
    return model, inputs


def tiny_artifact(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An artifact of it, and inputs for numpy."""
    model, inputs = tiny_model()
    routed = dcr.route(model, inputs)
    names = [spec.name for spec in routed.program.blocks]
    schedule = TokenSchedule(
        {names[0]: (8, 16), names[1]: (16, 4)},
        dict.fromkeys(names, 16),
        TimestepBuckets.even(2),
    )
    dcr.export(dcr.freeze(routed, schedule=schedule), folder)
    return folder, {name: tensor.numpy() for name, tensor in inputs.items()}
