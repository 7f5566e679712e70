"""What the hard tests work on: a small DiT of diffusers with two timestep buckets, and a smaller one by hand."""

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


class HandBlock(torch.nn.Module):
    """Attention and a feed-forward, moved by the timestep: what a block is, in as few operators as can be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.mlp = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        three = self.qkv(self.norm(x) + time[:, None]).chunk(3, dim=-1)
        one_head = [part.unsqueeze(1) for part in three]
        mixed = torch.nn.functional.scaled_dot_product_attention(*one_head).squeeze(1)
        x = x + self.out(mixed)
        return x + self.mlp(torch.relu(self.norm(x)))


class HandDiT(torch.nn.Module):
    """(batch, tokens, 4) and (batch,) -> (batch, tokens, 4)."""

    def __init__(self, width: int = 16, tokens: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, width)
        self.position = torch.nn.Parameter(torch.randn(1, tokens, width))
        self.time = torch.nn.Linear(1, width)
        self.blocks = torch.nn.ModuleList(HandBlock(width) for _ in range(blocks))
        self.last = torch.nn.Linear(width, 4)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(hidden_states) + self.position
        time = self.time(timestep[:, None].to(x.dtype) / 1000)
        for block in self.blocks:
            x = block(x, time)
        return self.last(x)


def hand_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Two blocks, 16 tokens; seeded. Compiled hundreds of times by the tests of kills and of full disks."""
    torch.manual_seed(0)
    model = HandDiT().eval()
    return model, {
        "hidden_states": torch.randn(2, 16, 4),
        "timestep": torch.tensor([800, 800]),
    }


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
