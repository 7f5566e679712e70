"""One run with everything it is built from: the model of its task, on its device, and images to train on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from benchmarks.quality.job import Job
from benchmarks.quality.settings import Scale
from benchmarks.reference import fashion_mnist, inpainting
from diffcr_compile.config import RoutingConfig
from diffcr_compile.program import DiTGraph
from diffcr_compile.reference import demo

MODELS: dict[str, Callable[[], nn.Module]] = {
    "generation": demo.load_reference_dit,
    "inpainting": inpainting.load_inpainting_dit,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A job where it runs.

    Attributes:
        job: variant, budget, seed, steps and task.
        scale: how large the comparison is.
        work: folder of the comparison.
        data: folder of Fashion-MNIST.
    """

    job: Job
    scale: Scale
    work: Path
    data: Path

    def model(self) -> nn.Module:
        """The dense model, a fresh one."""
        return MODELS[self.job.task]().to(self.scale.device)

    def example(self) -> dict[str, Tensor]:
        inputs = demo.example_inputs()
        sample = inputs["hidden_states"]
        extra = torch.zeros(len(sample), self.condition_channels, *sample.shape[2:])
        inputs["hidden_states"] = torch.cat([sample, extra], 1)
        return {name: tensor.to(self.scale.device) for name, tensor in inputs.items()}

    def routed(self, config: RoutingConfig | None = None) -> DiTGraph:
        return dcr.route(self.model(), self.example(), config, self.job.seed)

    @property
    def done(self) -> bool:
        return (self.work / f"{self.job.name}.json").exists()

    @property
    def condition_channels(self) -> int:
        """Input channels beside the noisy image."""
        return inpainting.CONDITION_CHANNELS if self.job.task == "inpainting" else 0

    def train_images(self) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 32, 32) in [-1, 1] and labels (N,)."""
        return _images(self.data, "train")

    def condition(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the model is given beside noisy images (B, 1, 32, 32): (B, condition_channels, 32, 32)."""
        if not self.condition_channels:
            return images[:, :0]
        return inpainting.condition(images, inpainting.holes(len(images), generator))

    def asked_for(self, count: int) -> tuple[Tensor, Tensor]:
        """Labels (count,), classes in turn, and conditions of `count` samples; the holes are in held-out images."""
        labels = torch.arange(count) % demo.NUM_CLASSES
        if not self.condition_channels:
            return labels, torch.zeros(count, 0, 32, 32)
        images, found = _images(self.data, "test")
        of_class = [images[found == label] for label in range(demo.NUM_CLASSES)]
        rows = [
            of_class[label][n // demo.NUM_CLASSES] for n, label in enumerate(labels.tolist())
        ]
        generator = torch.Generator().manual_seed(demo.SAMPLE_SEED + self.job.seed)
        return labels, self.condition(torch.stack(rows), generator)

    def finished(self, images: Tensor, condition: Tensor) -> Tensor:
        """Samples as they are scored."""
        return inpainting.pasted(images, condition) if self.condition_channels else images


@functools.cache
def _images(data: Path, split: fashion_mnist.Split) -> tuple[Tensor, Tensor]:
    return fashion_mnist.load(data, split)
