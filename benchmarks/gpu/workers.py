"""Processes of the engines, one per family, started when first needed and again after a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.02
SHOWN_LINES = 15
END_SECONDS = 10.0


class Workers:
    """Runs cases in processes.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: for references, graphs and logs.
        seconds: most time for the measurement of a case.
    """

    def __init__(self, device: str, folder: Path, seconds: float) -> None:
        self._device, self._folder, self._seconds = device, folder, seconds
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._asked = 0

    def start(self, family: str) -> None:
        """Start a family's process, which loads its libraries meanwhile."""
        if family in self._processes:
            return
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", self._device]
        command += ["--folder", str(self._folder), "--seconds", str(self._seconds)]
        with self._log(family).open("ab") as log:
            self._processes[family] = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )

    def run(self, case: Case, most_seconds: float) -> dict[str, Any]:
        """A case's answer; ``status`` is ``error`` after a crash and ``late`` after too long a time."""
        self.start(case.family)
        process = self._processes[case.family]
        self._asked += 1
        answer = self._folder / f"answer_{self._asked}.json"
        asked = {"case": dataclasses.asdict(case), "answer": str(answer)}
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone; said below
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        end = time.monotonic() + most_seconds
        while not answer.exists():
            if process.poll() is not None:
                return self._crashed(case.family, process.returncode)
            if time.monotonic() > end:
                self._stop(case.family)
                return {"status": "late", "reason": f"no answer within {most_seconds:.0f} s"}
            time.sleep(POLL_SECONDS)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    def close(self) -> None:
        """End all processes."""
        for family in list(self._processes):
            self._stop(family)

    def _crashed(self, family: str, code: int) -> dict[str, Any]:
        _close(self._processes.pop(family))
        lines = self._log(family).read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(lines[-SHOWN_LINES:])
        return {"status": "error", "reason": f"the process ended with code {code}: {said}"}

    def _stop(self, family: str) -> None:
        process = self._processes.pop(family)
        process.kill()
        process.wait(END_SECONDS)
        _close(process)

    def _log(self, family: str) -> Path:
        return self._folder / f"{family}.log"


def _close(process: subprocess.Popen[str]) -> None:
    """Close the pipe of a process that is gone."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
