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
from diffcr_compile.calibrate.trained import LARGEST_NORM, make_optimizers, rate_factor
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


class Trainer:
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
        self.parameters, self.steps = parameters, scale.calibration_steps
        self.settings = CalibrationConfig(**OURS["calibration"])
        self.optimizers = make_optimizers(parameters, self.settings, blocks)
        for group in others:
            self.optimizers[0].add_param_group(group)
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One optimizer step, and one of the moving averages."""
        nn.utils.clip_grad_norm_(self.parameters.values(), LARGEST_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate_factor(step, self.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.ema, (step + 1) / (step + 10))
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def take_averages(self) -> None:
        """Put the moving averages in place of the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])


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
