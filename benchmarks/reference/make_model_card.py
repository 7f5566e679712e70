"""Write the model card of the reference DiT from its weights and its training log.

    python -m benchmarks.reference.make_model_card --weights build/reference/dit.safetensors \
        --log build/reference/training_log.jsonl --out diffcr_compile/reference/assets --samples 500

Samples the model (about 3 images a second on two CPU cores, 20 Euler steps), measures their
quality, and writes ``MODEL_CARD.md``, ``loss_curve.png``, ``samples.png`` and ``dit_config.json``.
Every figure in the card comes from the two files given, from these samples or from the data.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from benchmarks.reference.train_dit import EMA_DECAY, LABEL_DROP, WARMUP_STEPS
from diffcr_compile.reference.model import NULL_LABEL, new_reference_dit
from diffcr_compile.reference.quality import (
    METRIC,
    NUM_CLASSES,
    extract,
    load_real_statistics,
    score,
)

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PER_CLASS_SHOWN = 8
SCALE, GAP, NAME_WIDTH = 2, 2, 84  # of the sheet, in pixels


@dataclass(frozen=True)
class Facts:
    """What the card states.

    Attributes:
        records: lines of the training log, in order.
        metadata: of the weights file; seed and stages.
        sha256: of the weights file.
        num_bytes: of the weights file.
        parameters: trained numbers in the model.
        quality: of the samples, as `diffcr_compile.reference.quality.score` gives it.
        per_class: share of the samples of each class that the feature network recognises.
        steps: Euler steps per sample.
        sample_seed: of the initial noise.
    """

    records: list[dict[str, Any]]
    metadata: dict[str, str]
    sha256: str
    num_bytes: int
    parameters: int
    quality: dict[str, Any]
    per_class: list[float]
    steps: int
    sample_seed: int


def load_model(path: Path) -> tuple[DiTTransformer2DModel, dict[str, str]]:
    """The reference DiT with the fp16 weights of a file in fp32, and the file's metadata."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    model = new_reference_dit()
    model.load_state_dict(weights, strict=True)
    return model.eval(), metadata


@torch.inference_mode()
def sample(model: DiTTransformer2DModel, labels: Tensor, *, steps: int, seed: int) -> Tensor:
    """Images (N, 1, 32, 32) of labels (N,): Euler steps from noise at t = 1 to t = 0, no guidance."""
    # all noise is drawn at once, so that a sample does not depend on the batch it is in
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 1, 32, 32, generator=generator)
    times = torch.linspace(1, 0, steps + 1).tolist()
    finished = []
    for start, label in zip(noise.split(50), labels.split(50), strict=True):
        x = start  # (50, 1, 32, 32)
        for t, t_next in itertools.pairwise(times):
            timestep = torch.full((len(x),), 1000 * t)
            v = model(x, timestep=timestep, class_labels=label).sample
            x = x + (t_next - t) * v
        finished.append(x)
        print(f"{sum(map(len, finished))}/{len(labels)} samples", flush=True)
    return torch.cat(finished)


def draw_sheet(images: Tensor, labels: Tensor, path: Path) -> None:
    """One row per class with its name and up to eight of its images."""
    cell = images.shape[-1] * SCALE + GAP
    size = (NAME_WIDTH + PER_CLASS_SHOWN * cell, NUM_CLASSES * cell)
    sheet = Image.new("L", size, color=255)
    draw = ImageDraw.Draw(sheet)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for row, name in enumerate(CLASS_NAMES):
        draw.text((4, row * cell + cell // 2 - 6), name, fill=0)
        for column, image in enumerate(pixels[labels == row][:PER_CLASS_SHOWN, 0]):
            tile = Image.fromarray(image.numpy())
            tile = tile.resize((cell - GAP, cell - GAP), Image.Resampling.NEAREST)
            sheet.paste(tile, (NAME_WIDTH + column * cell, row * cell))
    sheet.save(path, optimize=True)


def draw_loss_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over all steps, with a line where the image size changes."""
    steps = total_steps(records)
    # without pyplot there is no display to look for and nothing to close
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    train = [record["train_loss"] for record in records]
    held_out = [record["held_out_loss_ema"] for record in records]
    axes.plot(steps, train, color="0.7", lw=1, label="training loss, one batch of the log")
    for stage in sorted({record["stage"] for record in records}):
        chosen = [i for i, record in enumerate(records) if record["stage"] == stage]
        size = records[chosen[0]]["image_size"]
        xs, ys = [steps[i] for i in chosen], [held_out[i] for i in chosen]
        axes.plot(xs, ys, marker=".", label=f"held-out loss, EMA weights, {size} x {size}")
        if stage:
            axes.axvline(steps[chosen[0] - 1], color="0.85", lw=1, zorder=0)
    low = min(train + held_out)
    axes.set(xlabel="step", ylabel="flow-matching loss (MSE)", ylim=(0.95 * low, 2.2 * low))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def total_steps(records: list[dict[str, Any]]) -> list[int]:
    """Steps since the first stage began, for each record; the log counts within a stage."""
    last = {record["stage"]: record["step"] for record in records}
    before = {stage: sum(last[s] for s in last if s < stage) for stage in last}
    return [before[record["stage"]] + record["step"] for record in records]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training log; of a step logged twice after a resume, the later one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    if not records:
        raise SystemExit(f"{path} holds no record. Give the log that train_dit.py wrote.")
    latest = {(record["stage"], record["step"]): record for record in records}
    return [latest[key] for key in sorted(latest)]


def card(facts: Facts) -> str:
    """The model card as Markdown."""
    sections = (_model, _data_and_training, _held_out, _quality, _limits, _reproduce)
    return "\n\n".join(section(facts) for section in sections) + "\n"


def _model(facts: Facts) -> str:
    megabytes = facts.num_bytes / 1e6
    return f"""# Reference DiT (Fashion-MNIST, 32 x 32)

A small class-conditional diffusion transformer, made to try, test and measure the compiler
without a download or a GPU. It is no end in itself: it draws grey pictures of clothes.

![Ten classes, eight samples each](samples.png)

| | |
|---|---|
| Class | `diffusers.DiTTransformer2DModel`, configuration in `dit_config.json` |
| Size | {facts.parameters / 1e6:.2f} M parameters; 8 blocks, width 128, 2 heads, adaLN-Zero |
| Input | 1 x 32 x 32 pixels in [-1, 1], patch 2, so 256 tokens; labels 0..9, null label {NULL_LABEL} |
| File | `dit.safetensors`, fp16, {megabytes:.2f} MB, sha256 `{facts.sha256}` |
| Licence | as the project, Apache-2.0; training data MIT |"""


def _data_and_training(facts: Facts) -> str:
    stages = ", then ".join(
        f"{record['step']} steps at {record['image_size']} x {record['image_size']}"
        for record in _last_of_stages(facts.records)
    )
    return f"""## Data
Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence, from the Debian package
`dataset-fashion-mnist`, checked by sha256. 60,000 training images; the 10,000 test images are
held out. 28 x 28 pixels, zero-padded to 32 x 32.

## Objective and recipe
Flow matching: x_t = (1 - t) x + t noise, the network predicts noise - x and is called with
`timestep = 1000 t`; t is the sigmoid of a normal number.
Stages: {stages}. Muon for the matrices in
the blocks, AdamW for the rest, warm-up of {WARMUP_STEPS} steps, linear decay at the end of the
last stage, EMA {EMA_DECAY} (the weights shipped), labels dropped with
probability {LABEL_DROP}, symmetric garments mirrored at random. Seed {facts.metadata.get("seed", "not recorded")}. The script
`benchmarks/reference/train_dit.py` is the full account."""


def _held_out(facts: Facts) -> str:
    rows = "\n".join(
        f"| {record['image_size']} x {record['image_size']} | {record['step']} "
        f"| {record['held_out_loss_ema']:.4f} | {record['images_per_second']:.0f} |"
        for record in _last_of_stages(facts.records)
    )
    return f"""## Held-out loss
Flow loss of the EMA weights on 512 test images with fixed noise and times, at the end of each
stage. Losses of different image sizes do not compare.

| images | step | held-out loss | training images per second |
|---|---|---|---|
{rows}

![Loss over steps](loss_curve.png)"""


def _quality(facts: Facts) -> str:
    count = facts.quality["num_samples"]
    floor = load_real_statistics().floor(count)
    real = load_real_statistics().info["test_accuracy"]
    classes = ", ".join(
        f"{name} {share:.2f}" for name, share in zip(CLASS_NAMES, facts.per_class, strict=True)
    )
    return f"""## Quality
{count} samples, labels balanced, {facts.steps} Euler steps, no guidance, noise of seed {facts.sample_seed}; against held-out
test images in the features of a 0.19 M parameter classifier. "Real images" is what as many
(nearest measured count: {floor["num_samples"]:.0f}) test images score against others. The figures do not compare
with any that use Inception features.

| | this model | real images |
|---|---|---|
| {METRIC}, lower is better | {facts.quality["kid_x1000"]:.2f} | {floor["kid_x1000"]:.2f} ± {floor["kid_x1000_spread"]:.2f} |
| Frechet distance in the same features, lower is better | {facts.quality["frechet"]:.2f} | {floor["frechet"]:.2f} |
| class accuracy, higher is better | {facts.quality["class_accuracy"]:.3f} | {float(real):.3f} |

Class accuracy by class: {classes}."""


def _limits(facts: Facts) -> str:
    weakest = min(range(NUM_CLASSES), key=facts.per_class.__getitem__)
    return f"""## Limits
* One data set of small grey pictures: what it says about routing need not hold for large models.
* Trained briefly, not to convergence; samples are noisier than real images, and the class
  recognised least is "{CLASS_NAMES[weakest]}" ({facts.per_class[weakest]:.2f}).
* The null label was trained, so guidance works, but no figure here uses it.
* The feature network saw the same kind of images only: the metric is sensitive to damage of this
  model, and says nothing about other pictures.
* fp16 rounding of the weights is part of the model: the figures above are of the file shipped."""


def _reproduce(facts: Facts) -> str:
    stages = facts.metadata.get("stages")
    extra = f" --stages {stages}" if stages else ""
    return f"""## How to reproduce
    python -m benchmarks.reference.train_features --out diffcr_compile/reference/assets
    python -m benchmarks.reference.train_dit --out build/reference{extra}
    python -m benchmarks.reference.make_model_card --weights build/reference/dit.safetensors \\
        --log build/reference/training_log.jsonl --out diffcr_compile/reference/assets \\
        --samples {facts.quality["num_samples"]}

`benchmarks/reference/README.md` has the order, the times and where the data comes from. Weights
from another machine or version of torch differ in the last digits at first, and then visibly."""


def _last_of_stages(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {record["stage"]: record for record in records}
    return [last[stage] for stage in sorted(last)]


def per_class_accuracy(images: Tensor, labels: Tensor) -> list[float]:
    """Share of the images of each class that the feature network recognises."""
    right = extract(images)[1] == labels
    return [right[labels == label].float().mean().item() for label in range(NUM_CLASSES)]


def write_card(
    weights: Path, log: Path, out: Path, *, samples: int, steps: int, seed: int
) -> Facts:
    """Sample, measure and write the four files into ``out``; returns what the card states."""
    if samples < 2 * NUM_CLASSES or samples % NUM_CLASSES:
        raise SystemExit(f"--samples {samples}: expected a multiple of 10, at least 20")
    records = read_log(log)
    model, metadata = load_model(weights)
    labels = torch.arange(samples) % NUM_CLASSES
    images = sample(model, labels, steps=steps, seed=seed)
    content = weights.read_bytes()
    facts = Facts(
        records=records,
        metadata=metadata,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        parameters=sum(p.numel() for p in model.parameters()),
        quality=score(images, labels),
        per_class=per_class_accuracy(images, labels),
        steps=steps,
        sample_seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    draw_sheet(images, labels, out / "samples.png")
    draw_loss_curve(records, out / "loss_curve.png")
    (out / "dit_config.json").write_text(model.to_json_string(), encoding="utf-8")
    (out / "MODEL_CARD.md").write_text(card(facts), encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500, help="a multiple of 10")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    args = parser.parse_args()
    facts = write_card(
        args.weights,
        args.log,
        args.out,
        samples=args.samples,
        steps=args.steps,
        seed=args.seed,
    )
    print(json.dumps({**facts.quality, "per_class": facts.per_class}, indent=2))


if __name__ == "__main__":
    main()
