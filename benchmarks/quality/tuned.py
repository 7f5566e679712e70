"""The control: the dense model trained on for as many steps, on real images.

The dense model distilled from itself would stay what it is, so its fine-tuning needs data: flow matching
on the Fashion-MNIST training split, as the reference model was trained. Optimizer, learning rates, their
course and the moving average are those of the calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.quality.settings import OURS, Scale
from benchmarks.reference import fashion_mnist
from diffcr_compile.calibrate.trained import TrainedParameters, make_optimizers
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.reference import demo


def build(seed: int, scale: Scale, data: Path) -> Any:
    from benchmarks.quality.variants import Built, plain

    images, labels = fashion_mnist.load(data, "train")
    model = demo.load_reference_dit()
    trainer = Trainer(dict(model.named_parameters()), ["transformer_blocks"], scale)
    losses = []
    for step in range(scale.calibration_steps):
        x, timestep, label, answer = flow_batch(
            images, labels, scale.batch, seed, step, (0.0, 1.0)
        )
        with autocast():
            velocity = model(x, timestep=timestep, class_labels=label).sample
        loss = mse_loss(velocity.float(), answer)
        loss.backward()
        trainer.update(step)
        losses.append(loss.item())
    trainer.take_averages()
    tail = losses[-20:]
    return Built(plain(model), facts={"final_flow_loss": sum(tail) / len(tail)})


class Trainer(TrainedParameters):
    """The calibration's way of training, for what is no routed program.

    Args:
        parameters: what is trained, by name.
        blocks: names of the blocks.
        scale: number of steps.
        others: further groups of parameters, such as ratios, for AdamW.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        blocks: Sequence[str],
        scale: Scale,
        others: Sequence[dict[str, Any]] = (),
    ) -> None:
        settings = {**OURS["calibration"], "steps": scale.calibration_steps}
        self.config = CalibrationConfig(**settings)
        self.parameters = parameters
        self.optimizers = make_optimizers(parameters, self.config, blocks)
        for group in others:
            self.optimizers[0].add_param_group(group)
        self.forget_averages()


def autocast() -> torch.autocast:
    """The calibration's precision."""
    enabled = OURS["calibration"]["precision"] == "bf16"
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def flow_batch(
    images: Tensor,
    labels: Tensor,
    batch: int,
    seed: int,
    step: int,
    times: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, their timesteps and labels, and the velocity that flow matching asks for.

    Args:
        images: (N, 1, 32, 32) in [-1, 1].
        labels: (N,).
        batch: how many to draw.
        seed: with `step`, decides everything that is drawn.
        step: from 0.
        times: t is uniform between these two, in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(images), (batch,), generator=generator)
    noise = torch.randn((batch, *images.shape[1:]), generator=generator)
    low, high = times
    t = low + (high - low) * torch.rand(batch, generator=generator)
    mixed = (1 - t)[:, None, None, None] * images[rows] + t[:, None, None, None] * noise
    return mixed, 1000 * t, labels[rows], noise - images[rows]
