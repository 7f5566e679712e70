"""The same inputs, seed and versions in other processes: are the bytes the same?

    python -m benchmarks.reliability.determinism --out results.json

* A compilation runs in processes that differ in all that must not matter: seed of Python's hashes, folder, locale,
  time zone, optimisation. Compared are all files of the artifact and the manifest without ``created``.
* What was calibrated once is frozen and exported with other numbers of threads. (A calibration itself is not the same
  with another number of threads: sums of floating-point numbers are then split in another way.)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.folders import result_of
from diffcr_compile.manifest import MANIFEST_FILE

ROOT = Path(__file__).resolve().parents[2]
# what each process has of its own; the first is what the others are compared with
PROCESSES: tuple[dict[str, str], ...] = (
    {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
    {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
    {
        "PYTHONHASHSEED": "3",
        "OMP_NUM_THREADS": "1",
        "TZ": "America/Lima",
        "PYTHONOPTIMIZE": "1",
    },
)
THREADS = ("1", "2", "4")


def result_with_manifest(folder: Path) -> dict[str, Any]:
    """All that must be the same: hashes of files, and the manifest without its time and its checksum."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    for name in ("created", "checksum"):
        manifest.pop(name)
    return {**result_of(folder), "manifest": manifest}


def run(
    model: str, settings: Sequence[str], processes: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """Compile `model` once in each process and compare.

    Args:
        model: as the command line names it.
        settings: ``section.key=value``.
        processes: environment of each.
    """
    started = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, environment in enumerate(processes):
            out = Path(scratch) / ("x" * number) / f"out {number}"
            _diffcr(_arguments("compile", model, settings, out), environment)
            results.append(result_with_manifest(out))
    facts = {"model": model, "processes": len(results)}
    return {**facts, **_compared([str(each) for each in processes], results, started)}


def run_threads(
    model: str, settings: Sequence[str], threads: Sequence[str] = THREADS
) -> dict[str, Any]:
    """Calibrate once, then freeze and export with other numbers of threads, and compare; like :func:`run`."""
    started = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        begun = Path(scratch) / "begun"
        _diffcr(_arguments("calibrate", model, settings, begun), {"OMP_NUM_THREADS": "1"})
        for count in threads:
            out = Path(scratch) / count
            shutil.copytree(begun, out)
            _diffcr(["export", str(out)], {"OMP_NUM_THREADS": count})
            results.append(result_with_manifest(out))
    facts = {"model": model, "threads": list(threads)}
    return {**facts, **_compared([f"{count} threads" for count in threads], results, started)}


def _compared(
    names: Sequence[str], results: Sequence[dict[str, Any]], started: float
) -> dict[str, Any]:
    """What differs from the first result, by the name of the run that has it."""
    different = [
        f"{run}: {name}"
        for run, result in zip(names, results, strict=True)
        for name in _differences(results[0], result)
    ]
    return {
        "files": len(results[0]["files"]), "different": different,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    files = [name for name in one["files"] if one["files"][name] != two["files"].get(name)]
    rest = [name for name in one if one[name] != two[name]]
    return files + rest


def _arguments(verb: str, model: str, settings: Sequence[str], out: Path) -> list[str]:
    return [verb, model, "-o", str(out), "--budget", "70%", *(f"--set={s}" for s in settings)]


def _diffcr(arguments: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffcr_compile", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr[-2000:]}")


SMALL = (
    "routing.buckets=2", "routing.multiple_of=4", "rollouts.trajectories=2", "rollouts.steps=4", "rollouts.batch=2",
    "calibration.steps=4", "calibration.batch=4",
)  # fmt: skip


HAND, REFERENCE = "python:benchmarks.reliability.cases:hand_model", "demo"


def everything(models: Sequence[str] = (HAND, REFERENCE)) -> dict[str, Any]:
    """Both, on the small model and on the reference model."""
    return {
        "processes": [run(model, SMALL, PROCESSES) for model in models],
        "threads": [run_threads(model, SMALL) for model in models],
    }


def main() -> None:
    """Run everything and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="without the reference model")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = json.dumps(everything([HAND] if given.small else [HAND, REFERENCE]), indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
