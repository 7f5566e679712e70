"""The reference model as a case for the compiler: model, inputs, conditions, quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from diffcr_compile.errors import ArtifactError
from diffcr_compile.reference.model import NULL_LABEL, new_reference_dit
from diffcr_compile.runtime.sampler import euler_flow

WEIGHTS = "dit.safetensors"
NAME = "reference DiT (Fashion-MNIST, 256 tokens)"
SAMPLE_SEED = 20_26
# What the demo sets, beside the defaults.
SETTINGS: dict[str, dict[str, Any]] = {"export": {"batch": 32}}
NUM_CLASSES = NULL_LABEL


def load_reference_dit() -> nn.Module:
    """The trained reference DiT in fp32, evaluation mode."""
    asset = resources.files("diffcr_compile.reference") / "assets" / WEIGHTS
    if not asset.is_file():
        raise ArtifactError(
            f"the package holds no {WEIGHTS}; make it with benchmarks/reference/train_dit.py"
        )
    model: nn.Module = new_reference_dit()
    tensors = load(asset.read_bytes())
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def example_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Inputs of the reference DiT: noise (batch, 1, 32, 32), timesteps in (0, 1000], labels 0..9."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 1, 32, 32, generator=generator),
        "timestep": torch.linspace(1000, 125, batch),
        "class_labels": torch.arange(batch) % NUM_CLASSES,
    }


def draw_labels(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    """Conditions for rollouts: class labels, uniformly."""
    return {"class_labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator)}


def sample_images(
    denoise: Callable[..., Any],
    num_samples: int,
    steps: int,
    batch: int,
    seed: int = SAMPLE_SEED,
) -> tuple[np.ndarray, np.ndarray]:
    """Images (num_samples, 1, 32, 32) and their labels, classes in turn; the same noise for equal seeds.

    Args:
        denoise: a runner, called with hidden_states, timestep and class_labels.
        num_samples: how many images.
        steps: Euler steps.
        batch: the batch size that `denoise` takes; the last batch is filled up and cut.
        seed: of the noise.
    """
    noise = (
        np.random.default_rng(seed)
        .standard_normal((num_samples, 1, 32, 32))
        .astype(np.float32)
    )
    labels = np.arange(num_samples, dtype=np.int64) % NUM_CLASSES
    images = []
    for start in range(0, num_samples, batch):
        rows = np.arange(start, start + batch) % num_samples

        def velocity(x: np.ndarray, t: float, rows: np.ndarray = rows) -> np.ndarray:
            times = np.full(len(rows), t, np.float32)
            result: np.ndarray = denoise(
                hidden_states=x, timestep=times, class_labels=labels[rows]
            )
            return result

        images.append(euler_flow(velocity, noise[rows], steps))
    return np.concatenate(images)[:num_samples], labels


@dataclasses.dataclass(frozen=True)
class QualityEvaluation:
    """What ``dcr.compile(evaluate=...)`` wants: sample both on the same seeds, compare, keep pictures."""

    num_samples: int
    steps: int
    batch: int

    def __call__(
        self, dense: Callable[..., Any], compressed: Callable[..., Any], folder: Path
    ) -> dict[str, Any]:
        from diffcr_compile.reference.quality import quality_report
        from diffcr_compile.report import write_sample_sheet

        images = {}
        for name, denoise in (("dense", dense), ("compressed", compressed)):
            images[name], labels = sample_images(
                denoise, self.num_samples, self.steps, self.batch
            )
            shown = min(self.num_samples, 50)
            write_sample_sheet(
                images[name][:shown], folder / f"samples_{name}.png", columns=10, scale=2
            )
        result = quality_report(
            torch.from_numpy(images["dense"]),
            torch.from_numpy(images["compressed"]),
            torch.from_numpy(labels),
        )
        result["conditions"] = {
            **result.get("conditions", {}),
            "sampler": f"Euler, {self.steps} steps, no guidance",
            "seed": SAMPLE_SEED,
            "labels": "classes in turn",
        }
        return result
