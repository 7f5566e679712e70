"""A model that does not lie on the CPU, on machines without a GPU: no stage mixes devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.other_device.build import build

ROOT = Path(__file__).resolve().parent.parent


def test_every_stage_works_on_another_device_than_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.other_device.script", str(build(tmp_path))]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["route", "freeze", "calibrate", "export"]
