"""The second task: the reference network with a mask and the masked image as further input channels.

As inpainting models are made (Rombach et al. 2022): channel 0 is the noisy image, channel 1 the mask, 1 where
pixels are to be painted, channel 2 the image with those pixels at 0. The network answers for channel 0.
``train_dit.py --task inpainting`` makes the weights beside this file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffcr_compile.reference.model import new_reference_dit

WEIGHTS = Path(__file__).parent / "dit_inpainting.safetensors"
CONDITION_CHANNELS = 2
SMALLEST, LARGEST = 10, 20  # pixels, sides of a hole
BORDER = 2  # pixels around the 28 x 28 picture, which hold nothing


def new_inpainting_dit(sample_size: int = 32) -> nn.Module:
    """The network with fresh weights, in training mode."""
    return new_reference_dit(sample_size, in_channels=1 + CONDITION_CHANNELS)


def load_inpainting_dit() -> nn.Module:
    """The trained network in fp32, evaluation mode."""
    if not WEIGHTS.exists():
        raise SystemExit(
            f"{WEIGHTS} does not exist; make it with benchmarks/reference/train_dit.py --task inpainting"
        )
    model = new_inpainting_dit()
    model.load_state_dict({name: t.float() for name, t in load_file(WEIGHTS).items()})
    return model.eval()


def holes(count: int, generator: torch.Generator, size: int = 32) -> Tensor:
    """Masks (count, 1, size, size): 1 in one rectangle each, 0 elsewhere; for 32 x 32 pixels, or scaled down."""
    scale = 32 // size
    inner = 32 - 2 * BORDER
    sides = torch.randint(SMALLEST, LARGEST + 1, (count, 2), generator=generator)
    free = torch.rand(count, 2, generator=generator)
    starts = BORDER + (free * (inner - sides + 1)).long()
    pixels = torch.arange(0, 32, scale)
    inside = [
        (pixels >= starts[:, axis, None]) & (pixels < (starts + sides)[:, axis, None])
        for axis in (0, 1)
    ]
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()


def condition(images: Tensor, masks: Tensor) -> Tensor:
    """Channels 1 and 2: (B, 2, H, W) of images (B, 1, H, W) and masks (B, 1, H, W)."""
    return torch.cat([masks, images * (1 - masks)], 1)


def pasted(painted: Tensor, known: Tensor) -> Tensor:
    """What was painted (B, 1, H, W) with all known pixels put back, from the condition (B, 2, H, W)."""
    mask, rest = known[:, :1], known[:, 1:]
    return painted * mask + rest
