"""What variants are calibrated on, made once for all of them and all seeds of a task.

Noisy training images, and what the dense model says of them. Part of the target is the true velocity
(``LatentStates.true_share``), because the dense model trained on for as long sees true velocities too. Or, where steps
are distilled, the dense model's own sampling from noise, and the mean velocity of several of its steps: no images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffcr_compile as dcr
from benchmarks.quality.case import Case
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.config import RolloutConfig, RoutingConfig
from diffcr_compile.program import Stage
from diffcr_compile.reference import demo
from diffcr_compile.schedule import TimestepBuckets
from diffcr_compile.stages import program_of

BATCH = 250
ROLLOUT_BATCH = 128
DATA_SEED = 7


def make_states(case: Case) -> Path:
    """Make the states that a case is trained on, if their file is not there."""
    task, scale = case.job.task, case.scale
    if case.distils_steps:
        name = f"rollouts_{task}_{scale.trajectories}_{scale.few}x{scale.substeps}"
    else:
        name = f"states_{task}_{scale.states}_{scale.true_share}"
    path = case.work / f"{name}.safetensors"
    if not path.exists():
        made = _rolled_out(case) if case.distils_steps else _made(case, scale.states)
        tensors = {f"input.{name}": t.clone() for name, t in made.inputs.items()}
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({**tensors, "target": made.target, "timesteps": made.timesteps}, temporary)
        temporary.replace(path)
    return path


def teacher_states(case: Case) -> TeacherStates:
    """What a calibration trains on."""
    found = load_file(make_states(case))
    inputs = {k.removeprefix("input."): t for k, t in found.items() if k.startswith("input.")}
    return TeacherStates(inputs, found["target"], found["timesteps"])


def _made(case: Case, count: int) -> TeacherStates:
    program = program_of(case.routed(), Stage.ROUTED)
    latents = dcr.LatentStates(
        list(_items(case, count)),
        FlowMatchEulerDiscreteScheduler(),
        "flow",
        joined=("condition",) if case.condition_channels else (),
        per_latent=1,
        batch=BATCH,
        true_share=case.scale.true_share,
    )
    buckets = TimestepBuckets.even(RoutingConfig().buckets)
    return latents.teacher_states(program, buckets, DATA_SEED)


def _rolled_out(case: Case) -> TeacherStates:
    """The dense model's sampling in ``scale.substeps`` steps for each of the few."""
    assert not case.condition_channels, "sampling from noise alone"
    scale = case.scale
    settings = RolloutConfig(
        trajectories=scale.trajectories,
        steps=scale.few,
        substeps=scale.substeps,
        batch=min(scale.trajectories, ROLLOUT_BATCH),
    )
    program = program_of(case.routed(), Stage.ROUTED)
    sampler = dcr.FlowEuler(scale.few)
    return roll_out(program, sampler, settings, demo.draw_labels, DATA_SEED)


def _items(case: Case, count: int) -> Iterator[dict[str, Tensor]]:
    images, labels = case.train_images()
    generator = torch.Generator().manual_seed(DATA_SEED)
    rows = torch.randperm(len(images), generator=generator).repeat(-(-count // len(images)))
    conditions = case.condition(images[rows[:count]], generator)
    for row, condition in zip(rows[:count], conditions, strict=True):
        item = {"latent": images[row], "class_labels": labels[row]}
        yield {**item, "condition": condition} if case.condition_channels else item
