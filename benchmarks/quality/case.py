"""One run with everything it is built from: the model of its task, on its device, and images to train on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.job import Job
from benchmarks.quality.settings import DISTILLED, ROUTED, Scale
from benchmarks.reference import fashion_mnist, inpainting
from benchmarks.reference.train_features import balanced_order
from diffcr_compile.config import RoutingConfig
from diffcr_compile.program import DiTGraph, Program
from diffcr_compile.reference import demo
from diffcr_compile.reference.quality import load_real_statistics
from diffcr_compile.stages import captured, routed_program

MODELS: dict[str, Callable[[], nn.Module]] = {
    "generation": demo.load_reference_dit,
    "inpainting": inpainting.load_inpainting_dit,
}
CONDITION_CHANNELS = {"generation": 0, "inpainting": inpainting.CONDITION_CHANNELS}


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

    def routed(self, config: RoutingConfig | None = None) -> DiTGraph:
        """The routed model. It shares its weights with others of this process, so they must not be trained."""
        dense = _captured(self.job.task, self.scale.device)
        return routed_program(dense, config or RoutingConfig(), self.job.seed).module

    @property
    def needs_states(self) -> bool:
        """Whether it is trained on states of the task that are made first."""
        return self.job.variant in ROUTED or self.distils_steps

    @property
    def distils_steps(self) -> bool:
        """Whether it is trained towards the dense model's sampling in smaller steps."""
        return self.job.variant.endswith(DISTILLED)

    @property
    def done(self) -> bool:
        return (self.work / f"{self.job.name}.json").exists()

    @property
    def dense_images(self) -> Path:
        """The dense model's samples of the same noise. They are not published, runs that were taken up lack them."""
        return self.work / f"{self.job.dense.name}.safetensors"

    @property
    def condition_channels(self) -> int:
        """Input channels beside the noisy image."""
        return CONDITION_CHANNELS[self.job.task]

    def train_images(self) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 32, 32) in [-1, 1] and labels (N,)."""
        return _images(self.data, "train")

    def condition(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the model is given beside noisy images (B, 1, 32, 32): (B, condition_channels, 32, 32)."""
        if not self.condition_channels:
            return images[:, :0]
        return inpainting.condition(images, inpainting.holes(len(images), generator))

    def asked_for(self, count: int) -> tuple[Tensor, Tensor]:
        """Labels (count,), classes in turn, and conditions of `count` samples.

        The holes are in held-out images that the metric does not compare with.
        """
        labels = torch.arange(count) % demo.NUM_CLASSES
        if not self.condition_channels:
            return labels, torch.zeros(count, 0, 32, 32)
        statistics = load_real_statistics()
        images, found = _images(self.data, "test")
        drawn = torch.Generator().manual_seed(int(statistics.info["seed"]))
        unseen = balanced_order(found, drawn)[len(statistics.labels) :][:count]
        assert torch.equal(found[unseen], labels)
        generator = torch.Generator().manual_seed(demo.SAMPLE_SEED + self.job.seed)
        return labels, self.condition(images[unseen], generator)

    def finished(self, images: Tensor, condition: Tensor) -> Tensor:
        """Samples as they are scored."""
        return inpainting.pasted(images, condition) if self.condition_channels else images


@functools.cache
def _images(data: Path, split: fashion_mnist.Split) -> tuple[Tensor, Tensor]:
    return fashion_mnist.load(data, split)


@functools.cache
def _captured(task: str, device: str) -> Program:
    """The dense model of a task, captured once in a process."""
    model = MODELS[task]().to(device)
    inputs = demo.example_inputs()
    sample = inputs["hidden_states"]
    extra = torch.zeros(len(sample), CONDITION_CHANNELS[task], *sample.shape[2:])
    inputs["hidden_states"] = torch.cat([sample, extra], 1)
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    return captured(model, on_device, RoutingConfig(), model)
