"""Train the reference DiT: class-conditional flow matching on Fashion-MNIST, 32 x 32, 256 tokens.

    python -m benchmarks.reference.train_dit --data /usr/share/datasets/fashion-mnist --out build/reference
    python -m benchmarks.reference.train_dit --task inpainting --out build/inpainting --device cuda \
        --stages 16:1000,32:1400 --batch 128

The first takes about one hour on two CPU cores, the second some minutes on a GPU. Seeded; resumable (run the same command again); writes
``dit.safetensors`` or ``dit_inpainting.safetensors`` (fp16 EMA weights), ``training_log.jsonl`` and ``training_state.pt`` (resume
only, never shipped).

Flow matching: x_t = (1 - t) * x + t * noise, the network predicts noise - x, and is called with
``timestep = 1000 * t``. For inpainting it is given a mask and the masked image too. Labels are dropped to the null class 10 with probability 0.1.
Training is progressive: first on 16 x 16 images (64 tokens, a quarter of the cost), then 32 x 32.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss

from benchmarks.reference import fashion_mnist
from benchmarks.reference.inpainting import condition, holes, new_inpainting_dit
from diffcr_compile.calibrate.muon import StackedMuon
from diffcr_compile.reference.model import NULL_LABEL, REFERENCE_CONFIG, new_reference_dit

LABEL_DROP = 0.1
EMA_DECAY = 0.999
WARMUP_STEPS = 150
DECAY_FROM = (
    0.6  # share of a stage's steps after which its learning rate falls linearly to zero
)


def initialise_adaln_zero(model: nn.Module) -> None:
    """Start every block as the identity (DiT, Peebles and Xie 2023); diffusers does not."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def flow_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    time_ = torch.randn(len(images), generator=generator).sigmoid().to(images.device)
    mixed = (1 - time_[:, None, None, None]) * images + time_[:, None, None, None] * noise
    if model.config.in_channels > 1:
        masks = holes(len(images), generator, images.shape[-1]).to(images.device)
        mixed = torch.cat([mixed, condition(images, masks)], 1)
    predicted = model(mixed, timestep=1000 * time_, class_labels=labels).sample
    return mse_loss(predicted, noise - images)


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Flow loss on 512 test images with fixed noise and times."""
    generator = torch.Generator().manual_seed(1234)
    losses = [
        flow_loss(model, part, label, generator).item()
        for part, label in zip(images[:512].split(128), labels[:512].split(128), strict=True)
    ]
    return sum(losses) / len(losses)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and n.startswith("transformer_blocks") and "embed" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        StackedMuon([{"params": matrices, "lr": lr}]),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int, *, last_stage: bool) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    if not last_stage:
        return warm
    return warm * min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))


def resized(model: nn.Module, size: int) -> nn.Module:
    """The same weights for another image size: only the sin-cos position table differs."""
    other = new_reference_dit(size, model.config.in_channels)
    other.load_state_dict(model.state_dict())
    if size < REFERENCE_CONFIG["sample_size"]:
        # Small images see the area-averaged positions of the large grid, so that the second
        # stage starts from positions it already knows.
        full = new_reference_dit().pos_embed.pos_embed
        side = int(full.shape[1] ** 0.5)
        grid = full.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        small = avg_pool2d(grid, REFERENCE_CONFIG["sample_size"] // size)
        other.pos_embed.pos_embed.copy_(small.flatten(2).transpose(1, 2))
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=("generation", "inpainting"), default="generation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", default="16:1500,32:900", help="size:steps,size:steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    stages = [tuple(map(int, s.split(":"))) for s in args.stages.split(",")]
    state_file, log_file = args.out / "training_state.pt", args.out / "training_log.jsonl"
    images, labels = (t.to(args.device) for t in fashion_mnist.load(args.data, "train"))
    test_images, test_labels = (
        t.to(args.device) for t in fashion_mnist.load(args.data, "test")
    )

    torch.manual_seed(args.seed)
    model = new_inpainting_dit() if args.task == "inpainting" else new_reference_dit()
    initialise_adaln_zero(model)
    generator = torch.Generator().manual_seed(args.seed)
    resume = torch.load(state_file, weights_only=True) if state_file.exists() else None
    first_stage, first_step = (resume["stage"], resume["step"]) if resume else (0, 0)

    for stage, (size, steps) in enumerate(stages):
        if stage < first_stage:
            continue
        model = resized(model, size).to(args.device)
        if resume and stage == first_stage:
            model.load_state_dict(resume["model"])
        ema = copy.deepcopy(model)
        optimizers = make_optimizers(model, args.lr)
        if resume and stage == first_stage:
            ema.load_state_dict(resume["ema"])
            for optimizer, saved in zip(optimizers, resume["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            generator.set_state(resume["generator"])
        pool = REFERENCE_CONFIG["sample_size"] // size
        small_test = avg_pool2d(test_images, pool) if pool > 1 else test_images
        started = time.time()
        for step in range(first_step if stage == first_stage else 0, steps):
            factor = learning_rate_factor(step, steps, last_stage=stage == len(stages) - 1)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * factor
            chosen = torch.randint(len(images), (args.batch,), generator=generator)
            batch, label = images[chosen.to(images.device)], labels[chosen.to(images.device)]
            flip = torch.rand(args.batch, generator=generator).to(images.device) < 0.5
            # Shoes all point left and bags do not care; only symmetric garments are mirrored.
            flip &= torch.isin(label, torch.tensor([0, 1, 2, 3, 4, 6]).to(label))
            batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
            if pool > 1:
                batch = avg_pool2d(batch, pool)
            dropped = torch.rand(args.batch, generator=generator).to(label.device) < LABEL_DROP
            label = torch.where(dropped, NULL_LABEL, label)
            loss = flow_loss(model, batch, label, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                own = list(model.parameters())
                torch._foreach_lerp_(list(ema.parameters()), own, 1 - decay)
            done = step + 1
            if done % args.save_every == 0 or done == steps:
                record = {
                    "stage": stage,
                    "image_size": size,
                    "step": done,
                    "train_loss": loss.item(),
                    "held_out_loss_ema": held_out_loss(ema, small_test, test_labels),
                    "images_per_second": args.batch
                    * args.save_every
                    / (time.time() - started),
                }
                started = time.time()
                with log_file.open("a") as log:
                    log.write(json.dumps(record) + "\n")
                print(record, flush=True)
                temporary = state_file.with_suffix(".tmp")
                torch.save(
                    {
                        "stage": stage,
                        "step": done,
                        "model": model.state_dict(),
                        "ema": ema.state_dict(),
                        "generator": generator.get_state(),
                        "optimizers": [o.state_dict() for o in optimizers],
                    },
                    temporary,
                )
                temporary.replace(state_file)
        model = ema

    half = {n: value.half().contiguous().cpu() for n, value in model.state_dict().items()}
    save_file(
        half,
        args.out / f"dit{'_inpainting' * (args.task == 'inpainting')}.safetensors",
        metadata={"seed": str(args.seed), "stages": args.stages},
    )


if __name__ == "__main__":
    main()
