"""Sample a variant and score it: the same noise for equal seeds, classes in turn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.variants import Built, timesteps
from diffcr_compile.reference.demo import NUM_CLASSES, SAMPLE_SEED
from diffcr_compile.reference.quality import psnr_db, score

BATCH = 50


@torch.inference_mode()
def sample(built: Built, num_samples: int, steps: int, seed: int) -> Tensor:
    """Images (num_samples, 1, 32, 32) by Euler's method from t = 1 to 0, no guidance."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED + 1000 * seed)
    noise = torch.randn((num_samples, 1, 32, 32), generator=generator)
    labels = torch.arange(num_samples) % NUM_CLASSES
    torch.manual_seed(seed)  # draws of the random router and of merging
    images = []
    for x, label in zip(noise.split(BATCH), labels.split(BATCH), strict=True):
        built.start(steps)
        for timestep in timesteps(steps):
            x = x - built.denoise(x, timestep, label) / steps
        images.append(x)
    return torch.cat(images)


def measured(
    built: Built, num_samples: int, dense_steps: int, seed: int, reference: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """Scores of a variant where the dense model takes `dense_steps` steps, and its images.

    Args:
        built: the variant.
        num_samples: at least 2 per class.
        dense_steps: what the MACs are counted against.
        seed: of the noise.
        reference: the dense model's images of the same noise and steps; None for no PSNR.
    """
    steps = built.steps(dense_steps)
    images = sample(built, num_samples, steps, seed)
    labels = torch.arange(num_samples) % NUM_CLASSES
    psnr = None if reference is None else psnr_db(reference, images)
    found = {
        "steps_taken": steps,
        "macs": built.share(steps) * steps / dense_steps,
        **score(images, labels),
        "psnr_to_dense_db": psnr if psnr is not None and math.isfinite(psnr) else None,
    }
    return found, images
