"""Train the feature network of the quality metric, and store features of held-out real images.

    python -m benchmarks.reference.train_features --data /usr/share/datasets/fashion-mnist \
        --out diffcr_compile/reference/assets

A few minutes on two CPU cores. Seeded; figures vary in the third digit with the number of threads
and the version of torch, because sums are then taken in another order. Writes

* ``feature_cnn.safetensors`` (fp32): the network, trained on the 60,000 training images only;
* ``real_features.safetensors``: features (fp16) and labels of 2,500 test images, 250 per class,
  mean and covariance (fp32) over all 10,000 test images, and, as metadata, test accuracy,
  versions and the floors: what real images themselves score, by sample count.

The test images are used for nothing but these statistics: not to train, not to choose an epoch.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.reference import fashion_mnist
from diffcr_compile.reference.quality import (
    NET_FILE,
    NUM_CLASSES,
    REAL_FILE,
    FeatureNet,
    frechet_distance,
    gaussian,
    kid,
)

BATCH = 256
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.01
LARGEST_SHIFT = 2  # pixels; the zero padding is as wide, so a roll moves background only
REAL_PER_CLASS = 250
FLOOR_SAMPLES = (250, 500, 1000, 2500)
FLOOR_DRAWS = 40


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> FeatureNet:
    """A trained network, from images (N, 1, 32, 32) in [-1, 1] and labels (N,) in 0..9."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # channels_last and fp32: the backward of bf16 convolutions is slow on CPUs
    net = FeatureNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps
    )
    for epoch in range(epochs):
        started, losses = time.time(), []
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // BATCH * BATCH].split(BATCH):
            _, logits = net(_augmented(images[chosen], generator))
            loss = cross_entropy(logits, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean_loss, seconds = sum(losses) / len(losses), time.time() - started
        print(f"epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}, {seconds:.0f} s", flush=True)
    return net.eval()


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch moved by up to two pixels, one shift for all; every second image is mirrored."""
    down, right = torch.randint(
        -LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,), generator=generator
    ).tolist()
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images).roll((down, right), (2, 3))
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def features_and_accuracy(
    net: FeatureNet, images: Tensor, labels: Tensor
) -> tuple[Tensor, float]:
    """Features (N, 128) and the share of images whose class the network finds."""
    parts = [net(part) for part in images.split(500)]
    predicted = torch.cat([logits.argmax(1) for _, logits in parts])
    features = torch.cat([found for found, _ in parts])
    return features, (predicted == labels).float().mean().item()


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the samples in which every run of ten holds each class once."""
    per_class = []
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().flatten()
        per_class.append(members[torch.randperm(len(members), generator=generator)])
    shortest = min(map(len, per_class))
    return torch.stack([members[:shortest] for members in per_class], dim=1).flatten()


def floors(
    features: Tensor, labels: Tensor, real: Tensor, seed: int
) -> list[dict[str, float]]:
    """What real images score, for each of `FLOOR_SAMPLES`.

    KID: images outside of the ``real`` ones against these, both drawn per class. Frechet: N images against the
    statistics of the other test images. No image is ever on both sides.

    Args:
        features: (10000, 128), of all test images.
        labels: (10000,).
        real: (2500,) indices of the images that the metric compares with.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    outside = torch.ones(len(labels), dtype=torch.bool)
    outside[real] = False
    rest = outside.nonzero().flatten()
    found = []
    for count in FLOOR_SAMPLES:
        kids, distances = [], []
        for _ in range(FLOOR_DRAWS):
            drawn = rest[balanced_order(labels[rest], generator)[:count]]
            kids.append(
                1000 * kid(features[drawn], features[real], labels[drawn], labels[real])
            )
            others = torch.ones(len(labels), dtype=torch.bool)
            others[drawn] = False
            distances.append(
                frechet_distance(*gaussian(features[drawn]), *gaussian(features[others]))
            )
        found.append(
            {
                "num_samples": count,
                "kid_x1000": torch.tensor(kids).mean().item(),
                "kid_x1000_spread": torch.tensor(kids).std().item(),
                "frechet": sum(distances) / len(distances),
            }
        )
    return found


def write_assets(
    net: FeatureNet, images: Tensor, labels: Tensor, folder: Path, info: dict[str, str]
) -> dict[str, str]:
    """Write both files from the test images and return the metadata of the second."""
    features, accuracy = features_and_accuracy(net, images, labels)
    seed = int(info["seed"])
    order = balanced_order(labels, torch.Generator().manual_seed(seed))
    real = order[: NUM_CLASSES * REAL_PER_CLASS]
    # the metric sees the rounded features, so the floors must too
    rounded = features.clone()
    rounded[real] = features[real].half().float()
    mean, cov = gaussian(features)
    info = {**info, "test_accuracy": f"{accuracy:.4f}", "test_images": str(len(labels))}
    statistics = {
        **info,
        "real_images": "indices of the test split, drawn class-balanced with the seed",
        "floors": json.dumps(floors(rounded, labels, real, seed)),
    }
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, folder / NET_FILE, metadata=info)
    tensors = {
        "features": features[real].half(),
        "labels": labels[real].to(torch.uint8),
        "mean": mean.float(),
        "cov": cov.float(),
    }
    save_file(tensors, folder / REAL_FILE, metadata=statistics)
    for name in (NET_FILE, REAL_FILE):
        (folder / name).chmod(0o644)  # safetensors writes 0600, and these are installed
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("diffcr_compile/reference/assets"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    net = train(*fashion_mnist.load(args.data, "train"), epochs=args.epochs, seed=args.seed)
    info = {
        "what": "mean-pooled features and class head of a CNN on Fashion-MNIST, 32 x 32, [-1, 1]",
        "made_by": "benchmarks/reference/train_features.py",
        "data": "Fashion-MNIST, MIT licence, Debian dataset-fashion-mnist, checked by sha256",
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    statistics = write_assets(net, *fashion_mnist.load(args.data, "test"), args.out, info)
    print(json.dumps(statistics, indent=2))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
