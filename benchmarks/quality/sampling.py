"""Sample a variant and score it: the same noise for equal seeds, classes in turn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.case import Case
from benchmarks.quality.variants import Built, timesteps
from diffcr_compile.reference.demo import SAMPLE_SEED
from diffcr_compile.reference.quality import psnr_db, score

BATCH = 250


@torch.inference_mode()
def sample(built: Built, case: Case, steps: int) -> Tensor:
    """Images (samples, 1, 32, 32) by Euler's method from t = 1 to 0, no guidance."""
    seed, count, device = case.job.seed, case.scale.samples, case.scale.device
    generator = torch.Generator().manual_seed(SAMPLE_SEED + 1000 * seed)
    noise = torch.randn((count, 1, 32, 32), generator=generator)
    labels, conditions = case.asked_for(count)
    torch.manual_seed(seed)  # draws of the random router and of merging
    images = []
    for parts in zip(*(t.split(BATCH) for t in (noise, labels, conditions)), strict=True):
        x, label, condition = (part.to(device) for part in parts)
        built.start(steps)
        for timestep in timesteps(steps):
            given = torch.cat([x, condition], 1)
            x = x - built.denoise(given, timestep, label) / steps
        images.append(case.finished(x, condition).cpu())
    return torch.cat(images)


def measured(
    built: Built, case: Case, reference: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """Scores of a variant where the dense model takes the job's steps, and its images.

    Args:
        built: the variant.
        case: says how many samples, at least 2 per class, and the seed of the noise.
        reference: the dense model's images of the same noise and steps; None for no PSNR.
    """
    dense_steps = case.job.steps
    steps = built.steps(dense_steps)
    images = sample(built, case, steps)
    labels, _ = case.asked_for(len(images))
    psnr = None if reference is None else psnr_db(reference, images)
    found = {
        "steps_taken": steps,
        "macs": built.share(steps) * steps / dense_steps,
        **score(images, labels),
        "psnr_to_dense_db": psnr if psnr is not None and math.isfinite(psnr) else None,
    }
    return found, images
