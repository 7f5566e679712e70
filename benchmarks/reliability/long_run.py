"""A long calibration with a checkpoint every few steps: does memory stay where it is?

python -m benchmarks.reliability.long_run --steps 5000 --out results.json
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import diffcr_compile as dcr
from benchmarks.reliability.cases import hand_model
from benchmarks.reliability.load import resident_bytes
from diffcr_compile.calibrate.state import FILE
from diffcr_compile.config import make_config

SAVE_EVERY = 5
WARM_UP = 0.2  # of the steps: pools and caches fill up first


def run(steps: int) -> dict[str, Any]:
    """Calibrate the small model for `steps` steps, with a checkpoint every 5, and watch resident memory."""
    torch.set_num_threads(1)
    model, inputs = hand_model()
    config = make_config(
        {
            "routing": {"buckets": 2, "multiple_of": 4},
            "rollouts": {"trajectories": 16, "steps": 8, "batch": 4},
            "calibration": {
                "steps": steps,
                "batch": 8,
                "save_every": SAVE_EVERY,
                "train": "all",
            },
        }
    )
    seen: dict[int, int] = {}

    def progress(stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
        if stage == "calibrate" and done % max(1, steps // 50) == 0:
            gc.collect()
            seen[done] = resident_bytes()

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        routed = dcr.route(model, inputs, config.routing)
        result = dcr.calibrate(
            routed, budget="70%", config=config, folder=Path(folder), progress=progress
        )
        state = (Path(folder) / FILE).stat().st_size
    before = next(size for done, size in seen.items() if done >= WARM_UP * steps)
    after = list(seen.values())[-1]
    return {
        "steps": steps, "checkpoints": steps // SAVE_EVERY, "resident_bytes": after,
        "memory_growth": round(after / before - 1, 4),
        "bytes_per_step": round((after - before) / (steps * (1 - WARM_UP)), 1),
        "history_bytes_per_step": round(len(json.dumps(result.history)) / steps, 1),
        "state_bytes": state, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def main() -> None:
    """Run it and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = json.dumps(run(given.steps), indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
