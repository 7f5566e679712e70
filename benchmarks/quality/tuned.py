"""The controls: the dense model trained on for as many steps.

On real images: distilled from itself step by step it would stay what it is, so its fine-tuning needs data, flow
matching on the Fashion-MNIST training split, as the reference model was trained. Or, steps distilled, towards its own
sampling in smaller steps. Optimizer, learning rates, their course and the moving average are those of the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.quality.case import Case
from benchmarks.quality.settings import OURS, Scale
from benchmarks.quality.states import teacher_states
from diffcr_compile.calibrate.trained import TrainedParameters, make_optimizers
from diffcr_compile.config import CalibrationConfig

# Noisy images with their condition, timesteps, labels, and the answer that is asked for.
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def build(case: Case) -> Any:
    from benchmarks.quality.variants import Built, plain

    model, scale = case.model(), case.scale
    trainer = Trainer(dict(model.named_parameters()), ["transformer_blocks"], scale)
    losses = []
    batch_of = rollout_batches(case) if case.distils_steps else flow_batches(case)
    for step in range(scale.calibration_steps):
        x, timestep, label, answer = batch_of(step)
        with autocast(scale.device):
            velocity = model(x, timestep=timestep, class_labels=label).sample
        loss = mse_loss(velocity.float(), answer)
        loss.backward()
        trainer.update(step)
        losses.append(loss.item())
    trainer.take_averages()
    tail = losses[-20:]
    return Built(plain(model), facts={"final_loss": sum(tail) / len(tail)})


def flow_batches(case: Case) -> Callable[[int], Batch]:
    """Batches for flow matching at all times."""
    return lambda step: flow_batch(case, step, (0.0, 1.0))


def rollout_batches(case: Case) -> Callable[[int], Batch]:
    """Batches of the dense model's sampling, with the mean velocity of its smaller steps."""
    states = teacher_states(case)

    def batch_of(step: int) -> Batch:
        generator = torch.Generator().manual_seed(case.job.seed * 1_000_003 + step)
        rows = torch.randint(len(states), (case.scale.batch,), generator=generator)
        given = (
            *(
                states.inputs[name][rows]
                for name in ("hidden_states", "timestep", "class_labels")
            ),
            states.target[rows],
        )
        x, timestep, label, answer = (tensor.to(case.scale.device) for tensor in given)
        return x, timestep, label, answer

    return batch_of


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


def autocast(device: str) -> torch.autocast:
    """The calibration's precision."""
    enabled = OURS["calibration"]["precision"] == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def flow_batch(case: Case, step: int, times: tuple[float, float]) -> Batch:
    """Noisy images with their condition, timesteps and labels, and the velocity that flow matching asks for.

    Args:
        case: its seed, with `step`, decides everything that is drawn.
        step: from 0.
        times: t is uniform between these two, in [0, 1].
    """
    images, labels = case.train_images()
    batch = case.scale.batch
    generator = torch.Generator().manual_seed(case.job.seed * 1_000_003 + step)
    rows = torch.randint(len(images), (batch,), generator=generator)
    clean = images[rows]
    noise = torch.randn(clean.shape, generator=generator)
    low, high = times
    t = low + (high - low) * torch.rand(batch, generator=generator)
    mixed = (1 - t)[:, None, None, None] * clean + t[:, None, None, None] * noise
    given = torch.cat([mixed, case.condition(clean, generator)], 1)
    device = case.scale.device
    return (
        given.to(device),
        1000 * t.to(device),
        labels[rows].to(device),
        (noise - clean).to(device),
    )
