"""One rank of a calibration in a process of its own: ``python -m tests.rank_worker rank count folder meeting dies_at settings``.

The folder holds the meeting point (``meeting_<n>``), what ranks share, and each rank's result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.calibrate.distributed import joined_ranks
from diffcr_compile.calibrate.sharded_tensors import is_sharded
from diffcr_compile.calibrate.trained import TrainedParameters
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.errors import DiffCRError
from tests import model_parts, models

STEPS = 50
BATCH = 5  # does not divide by two: shares of 3 and 2


class ScaledBlock(model_parts.Block):
    """With a parameter that cannot be split, and an output that is a view."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, *args: Any) -> Tensor:
        return (self.scale * super().forward(*args)).flatten().reshape(args[0].shape)


def settings(changes: dict[str, Any]) -> CompileConfig:
    """A few trajectories, and a calibration that goes through all its parts; `changes` of its settings."""
    return make_config({
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 6, "batch": 2, "steps": 4},
        "calibration": {"steps": STEPS, "batch": BATCH, "save_every": 10, "rank_timeout": 60, **changes},
    })  # fmt: skip


def calibrate(
    folder: Path | None, changes: dict[str, Any], progress: Any = None
) -> tuple[Any, Any]:
    """The routed graph and what was learned."""
    model, inputs = models.plain(block=ScaledBlock)
    config = settings(changes)
    routed = dcr.route(model, inputs, config.routing)
    result = dcr.calibrate(
        routed,
        budget="70%",
        config=config,
        folder=folder,
        key="k",
        progress=progress,
    )
    return routed, result


def numbers_held(trained: TrainedParameters) -> int:
    """How many numbers this process holds of what is trained: weights, averages and moments."""
    held = [*trained.parameters.values(), *trained.averages.values()]
    for optimizer in trained.optimizers:
        for entry in optimizer.state.values():
            held += [value for value in entry.values() if value.ndim]
    return sum(t.to_local().numel() if is_sharded(t) else t.numel() for t in held)


def numbers_in_all(changes: dict[str, Any]) -> int:
    """The same of one process alone, after its first step."""
    found: list[int] = []
    with counted(found):
        calibrate(None, {**changes, "shard": False, "steps": 1})
    return max(found)


@contextlib.contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """What is held after each update is appended to `found` while the context lasts."""
    update = TrainedParameters.update

    def update_and_count(trained: TrainedParameters, step: int) -> None:
        update(trained, step)
        found.append(numbers_held(trained))

    with unittest.mock.patch.object(TrainedParameters, "update", update_and_count):
        yield


def main(
    rank: int, count: int, folder: Path, meeting: str, dies_at: int, changes: dict[str, Any]
) -> int:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / meeting}", rank=rank, world_size=count
    )

    def step(stage: str, done: int, _: int, __: Any) -> None:
        if stage == "calibrate" and done == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with joined_ranks(60) as ranks:
            ranks.check_same("the numbers", [torch.tensor([rank])])
    except DiffCRError as error:
        (folder / f"different_{rank}.json").write_text(json.dumps(error.to_dict()))
    held: list[int] = []
    try:
        with counted(held):
            routed, result = calibrate(folder / "state", changes, step)
    except DiffCRError as error:
        (folder / f"error_{rank}.json").write_text(json.dumps(error.to_dict()))
        return error.exit_code
    found = {
        "losses": [record["loss"] for record in result.history],
        "schedule": result.schedule.to_json(),
        "sum": sum(float(p.detach().double().abs().sum()) for p in routed.parameters()),
        "held": max(held, default=0),
    }
    (folder / f"result_{rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    number, of, where, name, last, changed = sys.argv[1:]
    sys.exit(main(int(number), int(of), Path(where), name, int(last), json.loads(changed)))
