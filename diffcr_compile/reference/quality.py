"""How good are samples of the reference DiT: distances in the features of a small classifier.

The feature network is a 0.19 M parameter CNN trained on the Fashion-MNIST training split. It and
the features of held-out real images lie beside this file, so nothing here needs the data set;
``benchmarks/reference/train_features.py`` makes both.

* `kid`: kernel distance (Binkowski et al. 2018) between generated and real features. Unbiased,
  so it may be slightly negative for perfect samples, and it is the headline for small N.
* `frechet_distance`: distance of two Gaussians. Biased upwards for small N; compare only figures
  of equal N.

Neither is comparable with figures that use Inception features (FID, KID of other papers).
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffcr_compile.errors import AccuracyError, ArtifactError, UsageError
from diffcr_compile.reference.distances import frechet_distance, gaussian, kid

__all__ = [
    "METRIC",
    "FeatureNet",
    "RealStatistics",
    "extract",
    "frechet_distance",
    "gaussian",
    "kid",
    "load_feature_net",
    "load_real_statistics",
    "psnr_db",
    "quality_report",
    "score",
]

METRIC = "KID x 1000 (Fashion-MNIST features)"
ASSETS = Path(__file__).parent / "assets"
NET_FILE, REAL_FILE = "feature_cnn.safetensors", "real_features.safetensors"
IMAGE_SHAPE = (1, 32, 32)
NUM_CLASSES = 10
FEATURES = 128
CHANNELS, STRIDES = (24, 48, 48, 96, FEATURES), (2, 2, 1, 2, 1)
# Samplers overshoot [-1, 1] a little and bad models a lot, which clamping shows as it would look
# on a screen; beyond this the images are in another unit, such as 0..255.
LARGEST_PIXEL = 10.0
BATCH = 250


class FeatureNet(nn.Module):
    """Five convolutions, mean-pooled to 128 features, and a linear class head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = IMAGE_SHAPE[0]
        for outputs, stride in zip(CHANNELS, STRIDES, strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128) and class logits (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
        maps = self.body(images)  # (N, 128, 4, 4)
        features = maps.mean((2, 3))  # (N, 128)
        return features, self.head(features)


@dataclass(frozen=True)
class RealStatistics:
    """Features of held-out real images, none of which the feature network was trained on.

    Attributes:
        features: (2500, 128) float32, class-balanced.
        labels: (2500,) int64 in 0..9.
        mean: (128,) float64, over all 10,000 held-out images.
        cov: (128, 128) float64, over all 10,000 held-out images.
        floors: one entry per sample count, in ascending order: what as many real images score.
        info: how the files were made: seed, test accuracy, versions.
    """

    features: Tensor
    labels: Tensor
    mean: Tensor
    cov: Tensor
    floors: list[dict[str, float]]
    info: dict[str, str]

    def floor(self, num_samples: int) -> dict[str, float]:
        """The entry of ``floors`` whose sample count is nearest to ``num_samples``."""
        return min(self.floors, key=lambda entry: abs(entry["num_samples"] - num_samples))


@functools.cache
def load_feature_net() -> FeatureNet:
    """The shipped feature network in evaluation mode, on the CPU; loaded once.

    Raises:
        ArtifactError: the file is missing, unreadable or of another network.
    """
    tensors, _ = _read(ASSETS / NET_FILE)
    net = FeatureNet()
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{NET_FILE} does not hold the weights of FeatureNet: {error}. Restore the file, or "
            "make it with benchmarks/reference/train_features.py."
        ) from error
    return net.eval().requires_grad_(False)


@functools.cache
def load_real_statistics() -> RealStatistics:
    """The shipped features of held-out real images; loaded once.

    Raises:
        ArtifactError: the file is missing, unreadable or of another layout.
    """
    tensors, info = _read(ASSETS / REAL_FILE)
    expected = {"features", "labels", "mean", "cov"}
    if set(tensors) != expected or "floors" not in info:
        raise ArtifactError(
            f"{REAL_FILE} holds {sorted(tensors)} and metadata {sorted(info)}; expected "
            f"{sorted(expected)} and 'floors'. Restore the file."
        )
    floors = json.loads(info["floors"])
    return RealStatistics(
        features=tensors["features"].float(),
        labels=tensors["labels"].long(),
        mean=tensors["mean"].double(),
        cov=tensors["cov"].double(),
        floors=sorted(floors, key=lambda entry: float(entry["num_samples"])),
        info={name: value for name, value in info.items() if name != "floors"},
    )


def extract(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, 128) float32 and predicted classes (N,) of images (N, 1, 32, 32) in [-1, 1].

    Pixels outside [-1, 1] are clamped, as a screen would.

    Raises:
        UsageError: the shape or the range is another one.
        AccuracyError: a pixel is NaN or infinite.
    """
    return _extract(_checked_images(images, "images"))


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two image sets (N, C, H, W) in [-1, 1], peak 2.

    One mean squared error over all images; pixels are clamped first; infinite for equal images.

    Raises:
        UsageError: the shapes differ, a set is empty, or the range is another one.
        AccuracyError: a pixel is NaN or infinite.
    """
    if a.shape != b.shape or a.numel() == 0:
        raise UsageError(
            f"psnr_db: the shapes are {tuple(a.shape)} and {tuple(b.shape)}; expected two equal "
            "ones, not empty. Compare images of the same noise and labels."
        )
    first, second = _clamped(a, "a"), _clamped(b, "b")
    error = (first.double() - second.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error > 0 else math.inf


def score(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Quality of one set of images (N, 1, 32, 32) in [-1, 1] asked for by labels (N,) in 0..9.

    Labels should be balanced as the real images are: a set without bags is scored worse for it.

    Returns:
        ``kid_x1000`` and ``frechet`` against held-out real images, lower is better;
        ``class_accuracy``, the share in [0, 1] that the feature network takes for its label;
        ``num_samples``.

    Raises:
        UsageError: shape or range of images or labels, or fewer than 2 images.
        AccuracyError: a pixel is NaN or infinite.
    """
    images = _checked_images(images, "images", at_least=2)
    labels = _checked_labels(labels, len(images))
    return _score(images, labels)


def quality_report(
    dense_images: Tensor, compressed_images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """The ``quality`` entry of a report: the same noise and labels, dense and compressed.

    Args:
        dense_images: (N, 1, 32, 32) in [-1, 1], from the dense model.
        compressed_images: (N, 1, 32, 32) in [-1, 1], from the compressed model.
        labels: (N,) in 0..9, balanced.

    Returns:
        Lower is better in ``dense`` and ``compressed``, which are KID x 1000, and in ``frechet``.
        ``floor`` is what held-out real images score as KID x 1000 at the nearest of the sample
        counts that were measured, and ``floor_spread`` the standard deviation of that over draws.
        ``psnr_to_dense_db`` is None if both sets are equal: JSON has no infinity.

    Raises:
        UsageError: shapes or ranges that do not fit, or fewer than 2 images.
        AccuracyError: a pixel is NaN or infinite.
    """
    dense_images = _checked_images(dense_images, "dense_images", at_least=2)
    compressed_images = _checked_images(compressed_images, "compressed_images", at_least=2)
    if len(dense_images) != len(compressed_images):
        raise UsageError(
            f"quality_report: {len(dense_images)} dense and {len(compressed_images)} compressed "
            "images; expected as many. Sample both from the same noise and labels."
        )
    labels = _checked_labels(labels, len(dense_images))
    psnr = psnr_db(dense_images, compressed_images)
    return {
        "metric": METRIC,
        "num_samples": len(labels),
        **_compared(_score(dense_images, labels), _score(compressed_images, labels)),
        "psnr_to_dense_db": psnr if math.isfinite(psnr) else None,
        "conditions": _conditions(labels),
    }


def _compared(dense: dict[str, Any], compressed: dict[str, Any]) -> dict[str, Any]:
    """Both scores side by side, with what as many real images get."""
    floor = load_real_statistics().floor(dense["num_samples"])
    both = {"dense": dense, "compressed": compressed}
    return {
        "dense": dense["kid_x1000"],
        "compressed": compressed["kid_x1000"],
        "floor": floor["kid_x1000"],
        "floor_spread": floor["kid_x1000_spread"],
        "frechet": {name: found["frechet"] for name, found in both.items()}
        | {"floor": floor["frechet"]},
        "class_accuracy": {name: found["class_accuracy"] for name, found in both.items()},
    }


def _conditions(labels: Tensor) -> dict[str, Any]:
    real = load_real_statistics()
    per_class = labels.bincount(minlength=NUM_CLASSES)
    return {
        "real_images_kid": len(real.features),
        "real_images_frechet": int(real.info["test_images"]),
        "floor_num_samples": int(real.floor(len(labels))["num_samples"]),
        "kid_estimate": "per class" if _drawn_per_class(labels) else "plain",
        "smallest_and_largest_class": [int(per_class.min()), int(per_class.max())],
        "class_accuracy_of_real_images": float(real.info["test_accuracy"]),
    }


def _drawn_per_class(labels: Tensor) -> bool:
    """Whether every class that occurs has the two samples that a per-class estimate needs."""
    per_class = labels.bincount()
    return bool((per_class != 1).all())


def _score(images: Tensor, labels: Tensor) -> dict[str, Any]:
    real = load_real_statistics()
    features, predicted = _extract(images)
    mean, cov = gaussian(features)
    strata = labels if _drawn_per_class(labels) else None
    return {
        "num_samples": len(images),
        "kid_x1000": 1000 * kid(features, real.features, strata, real.labels),
        "frechet": frechet_distance(mean, cov, real.mean, real.cov),
        "class_accuracy": (predicted == labels).float().mean().item(),
    }


@torch.inference_mode()
def _extract(images: Tensor) -> tuple[Tensor, Tensor]:
    net = load_feature_net()
    features, predicted = [], []
    for batch in torch.split(images, BATCH):  # (<= 250, 1, 32, 32)
        found, logits = net(batch)
        features.append(found)
        predicted.append(logits.argmax(1))
    return torch.cat(features), torch.cat(predicted)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist. It ships with the package: install it again, or make the "
            "file with benchmarks/reference/train_features.py."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no readable safetensors file: {error}") from error


def _checked_images(images: Tensor, name: str, *, at_least: int = 1) -> Tensor:
    """Float32 images on the CPU, clamped to [-1, 1]."""
    if tuple(images.shape[1:]) != IMAGE_SHAPE:
        raise UsageError(
            f"{name}: found shape {tuple(images.shape)}, expected (N, 1, 32, 32). The metric "
            "knows only images like those of the reference DiT."
        )
    if len(images) < at_least:
        raise UsageError(
            f"{name}: {len(images)} image(s), expected at least {at_least}; a distance of "
            "distributions means little below some hundreds. Sample more."
        )
    return _clamped(images, name)


def _clamped(images: Tensor, name: str) -> Tensor:
    pixels = images.detach().to("cpu", torch.float32)
    if not pixels.isfinite().all():
        raise AccuracyError(
            f"{name}: {int((~pixels.isfinite()).sum())} of {pixels.numel()} pixels are NaN or "
            "infinite. Look for the first step of the sampler whose output is not finite."
        )
    lowest, highest = pixels.aminmax()
    if lowest >= 0 or max(-lowest, highest) > LARGEST_PIXEL:
        raise UsageError(
            f"{name}: pixels lie in [{lowest:.3g}, {highest:.3g}], expected [-1, 1] with -1 as "
            "the background. Convert with 2 * x - 1 from [0, 1], or x / 127.5 - 1 from 0..255."
        )
    return pixels.clamp(-1, 1)


def _checked_labels(labels: Tensor, count: int) -> Tensor:
    if labels.shape != (count,) or labels.is_floating_point():
        raise UsageError(
            f"labels: found shape {tuple(labels.shape)} and {labels.dtype}, expected ({count},) "
            "integers, one per image."
        )
    labels = labels.detach().to("cpu", torch.int64)
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise UsageError(
            f"labels: found values in [{int(labels.min())}, {int(labels.max())}], expected "
            f"0..{NUM_CLASSES - 1}. Samples of the null label have no class to be scored by."
        )
    return labels
