"""Kill a compilation at every step that touches the disk, start it again, compare with an undisturbed one.

    python -m benchmarks.reliability.kills --points 200 --out results.json

A process compiles a small DiT and kills itself (SIGKILL: nothing is flushed, no handler runs) just before its
n-th event: a file of the artifact opened for writing, renamed or deleted, a folder made, a step of rollouts,
calibration or export finished. Other points are moments in time, which fall inside of writes. After each kill the
folder must not load, or load what is whole; the same call again must end with the same hashes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffcr_compile as dcr
from benchmarks.reliability.cases import tiny_model
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import hash_files, read_manifest, verify_artifact

RENAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR


def settings() -> CompileConfig:
    return make_config(
        {
            "routing": {"buckets": 2, "multiple_of": 4},
            "rollouts": {"trajectories": 4, "steps": 4, "batch": 2},
            "calibration": {"steps": 8, "batch": 4, "save_every": 2},
        }
    )


def compile_tiny(out: Path, progress: Callable[..., None] | None = None) -> None:
    model, inputs = tiny_model()
    dcr.compile(
        model, out, example_inputs=inputs, budget="70%", config=settings(), progress=progress
    )


class Events:
    """Counts what happens to a folder, and kills this process before the n-th time."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0
        self.names: list[str] = []

    def watch(self) -> None:
        sys.addaudithook(self._audit)

    def progress(self, stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
        self._event(f"{stage} {done}/{count}")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in RENAMES and event != "open":
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & WRITING:
            return
        self._event(f"{event} {os.path.relpath(path, self.folder)}")

    def _event(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None], seconds: float | None = None) -> int:
    """Exit status of `work` in a fork of this process; killed after `seconds` if given."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            work()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result_of(folder: Path) -> dict[str, Any]:
    """What must be the same at the end: every file's hash, and the schedule."""
    manifest = read_manifest(folder)
    verify_artifact(folder, manifest)
    files = {name: entry["sha256"] for name, entry in hash_files(folder).items()}
    return {
        "files": files,
        "schedule": manifest.schedule,
        "reached": manifest.budget["reached"],
    }


def loads(folder: Path) -> bool:
    """Whether the folder of a killed run loads; then it must be whole."""
    try:
        manifest = read_manifest(folder)
        verify_artifact(folder, manifest)
    except ArtifactError:
        return False
    return True


def run(points: int, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Kill at `points` points, spread over all events and over time."""
    started = time.monotonic()
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, log = Path(scratch) / "whole", Path(scratch) / "events.json"

        def undisturbed() -> None:
            events = Events(whole, None)
            events.watch()
            compile_tiny(whole, events.progress)
            log.write_text(json.dumps(events.names))

        began = time.monotonic()
        if in_child(undisturbed) != 0:
            raise RuntimeError("the undisturbed run failed")
        duration = time.monotonic() - began
        expected, names = result_of(whole), json.loads(log.read_text())
        places: list[tuple[str, int | float]] = [("event", n + 1) for n in range(len(names))]
        if len(places) > points:
            places = sorted(generator.sample(places, points), key=lambda p: p[1])
        places += [
            ("time", round(generator.uniform(0.05, duration), 3))
            for _ in range(points - len(places))
        ]
        kills, wrong, unfinished = 0, [], 0
        for number, (kind, place) in enumerate(places):
            out = Path(scratch) / "killed"

            def disturbed(kind: str = kind, place: float = place, out: Path = out) -> None:
                events = Events(out, int(place) if kind == "event" else None)
                events.watch()
                compile_tiny(out, events.progress)

            status = in_child(disturbed, float(place) if kind == "time" else None)
            kills += status == -signal.SIGKILL
            what = names[int(place) - 1] if kind == "event" else f"{place} s"
            if status not in (0, -signal.SIGKILL):
                wrong.append(f"{kind} {what}: ended with {status}")
            unfinished += not loads(out)
            if in_child(lambda out=out: compile_tiny(out)) != 0:
                wrong.append(f"{kind} {what}: does not resume")
            elif result_of(out) != expected:
                wrong.append(f"{kind} {what}: another result")
            shutil.rmtree(out)
            if number % 20 == 19:
                report(f"{number + 1} of {len(places)}, {len(wrong)} wrong")
    return {
        "points": len(places), "kills": kills, "events_of_a_run": len(names), "not_loadable_after_the_kill": unfinished,
        "wrong": wrong, "seed": seed, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.points, arguments.seed), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
