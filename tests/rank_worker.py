"""One rank of a calibration in a process of its own: ``python -m tests.rank_worker rank count folder [dies_at]``.

The folder holds the meeting point (``meeting_<n>``), what ranks share, and each rank's result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import diffcr_compile as dcr
from diffcr_compile.calibrate.distributed import joined_ranks
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.errors import DiffCRError
from tests import models

STEPS = 50
BATCH = 5  # does not divide by two: shares of 3 and 2


def settings() -> CompileConfig:
    """A few trajectories, and a calibration that goes through all its parts."""
    return make_config({
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 6, "batch": 2, "steps": 4},
        "calibration": {"steps": STEPS, "batch": BATCH, "save_every": 10, "rank_timeout": 60},
    })  # fmt: skip


def calibrate(folder: Path | None, progress: Any = None) -> tuple[Any, Any]:
    """The routed graph and what was learned."""
    model, inputs = models.plain()
    config = settings()
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


def main(rank: int, count: int, folder: Path, meeting: str, dies_at: int) -> int:
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
    try:
        routed, result = calibrate(folder / "state", step)
    except DiffCRError as error:
        (folder / f"error_{rank}.json").write_text(json.dumps(error.to_dict()))
        return error.exit_code
    found = {
        "losses": [record["loss"] for record in result.history],
        "schedule": result.schedule.to_json(),
        "sum": sum(float(p.detach().double().abs().sum()) for p in routed.parameters()),
    }
    (folder / f"result_{rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    number, of, where, name, last = sys.argv[1:]
    sys.exit(main(int(number), int(of), Path(where), name, int(last)))
