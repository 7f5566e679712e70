"""Kill the command line at everything that it does to the disk, start it again, compare with an undisturbed run.

``diffcr compile``, and ``calibrate``, ``freeze`` and ``export`` one after the other, run in forks of a prepared
process. A fork kills itself (SIGKILL: nothing is flushed, no handler runs) just before its n-th event, see
``events.py``, or is ended by the kernel in the middle of a write. After each kill no file may be torn under its
final name, and the folder must not load, or load what is whole; the same command again must end with the same
hashes and leave nothing unfinished behind.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability import events
from benchmarks.reliability.folders import is_loadable, leftovers, result_of, torn_files
from benchmarks.reliability.prepared import Prepared, compile_arguments

VERBS = ("compile", "calibrate", "freeze", "export")
STAGED = VERBS[1:]
ENDS = (-signal.SIGKILL, -signal.SIGXFSZ)


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run is killed.

    Attributes:
        verb: of the command line.
        number: of the event, from 1.
        name: of the event.
        inside: in the write that follows the event, not before the event.
    """

    verb: str
    number: int
    name: str
    inside: bool

    def __str__(self) -> str:
        where = "in the write after" if self.inside else "before"
        return f"{self.verb}: {where} event {self.number}, {self.name}"


class Runs:
    """Undisturbed runs of verbs: their events, their results, and the folders that later verbs start from.

    Args:
        prepared: forks.
        verbs: ``compile`` first; the others in their order.
    """

    def __init__(self, prepared: Prepared, verbs: Sequence[str] = VERBS) -> None:
        self.prepared = prepared
        self.names = {verb: self._undisturbed(verb) for verb in verbs}
        self.expected = result_of(self._after("compile"))
        if "export" in verbs and result_of(self._after("export")) != self.expected:
            raise RuntimeError("stage by stage gives another artifact than compile")

    def arguments(self, verb: str, out: Path) -> list[str]:
        """The command line of a verb."""
        return compile_arguments(out, verb) if verb in VERBS[:2] else [verb, str(out)]

    def start(self, verb: str, out: Path) -> None:
        """Make `out` what it is before a verb."""
        shutil.rmtree(out, ignore_errors=True)
        if verb in STAGED[1:]:
            shutil.copytree(self._after(STAGED[STAGED.index(verb) - 1]), out)

    def finish(self, verb: str, out: Path) -> str:
        """Run a verb and those after it, undisturbed; what went wrong, or nothing."""
        todo = STAGED[STAGED.index(verb) :] if verb in STAGED else (verb,)
        for each in todo:
            status, said = self.prepared.command(self.arguments(each, out))
            if status != 0:
                return f"does not resume: {each} ends with {status}: {said[-300:]}"
        if result_of(out) != self.expected:
            return "another result"
        return f"left {leftovers(out)}" if leftovers(out) else ""

    def _after(self, verb: str) -> Path:
        return self.prepared.scratch / f"after_{verb}"

    def _undisturbed(self, verb: str) -> list[str]:
        out, log = self.prepared.scratch / "out", self.prepared.scratch / f"{verb}.log"
        self.start(verb, out)

        def watch() -> None:
            seen = events.Events(out)
            seen.log = log
            seen.watch()

        status, said = self.prepared.command(self.arguments(verb, out), watch)
        if status != 0:
            raise RuntimeError(f"undisturbed {verb} ended with {status}: {said[-2000:]}")
        shutil.copytree(out, self._after(verb))
        return log.read_text(encoding="utf-8").splitlines()


def all_points(names: dict[str, list[str]]) -> list[Point]:
    """Before every event of every verb, and in every write."""
    points = []
    for verb, found in names.items():
        for index, name in enumerate(found):
            points.append(Point(verb, index + 1, name, False))
            if name.startswith("open ") and name not in found[max(0, index - 2) : index]:
                points.append(Point(verb, index + 1, name, True))
    return points


def choose(points: Sequence[Point], count: int, seed: int) -> list[Point]:
    """`count` of the points, spread evenly over all of them; all if there are not more."""
    if count >= len(points):
        return list(points)
    generator = random.Random(seed)
    step = len(points) / count
    return [points[int((i + generator.random()) * step)] for i in range(count)]


def run(
    runs: Runs, count: int, seed: int = 0, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Kill at `count` points of all."""
    started = time.monotonic()
    points = all_points(runs.names)
    chosen = choose(points, count, seed)
    wrong: list[str] = []
    figures: collections.Counter[str] = collections.Counter()
    by_verb: collections.Counter[str] = collections.Counter()
    for number, point in enumerate(chosen):
        out = runs.prepared.scratch / "out"
        runs.start(point.verb, out)
        status = _killed(runs, point, out)
        if status in ENDS:
            figures["inside a write" if point.inside else "before an event"] += 1
            by_verb[point.verb] += 1
        elif status != 0:
            wrong.append(f"{point}: ended with {status}")
        figures["not loadable"] += out.exists() and not is_loadable(out)
        wrong += [f"{point}: torn {name}" for name in torn_files(out)]
        trouble = runs.finish(point.verb, out)
        wrong += [f"{point}: {trouble}"] if trouble else []
        if number % 20 == 19:
            report(f"{number + 1} of {len(chosen)} kills, {len(wrong)} wrong")
    return {
        "points": len(points), "kills": sum(by_verb.values()), **{k.replace(" ", "_"): v for k, v in figures.items()},
        "by_verb": dict(by_verb), "wrong": wrong, "seed": seed, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _killed(runs: Runs, point: Point, out: Path) -> int:
    trap = events.die_in_the_next_write if point.inside else events.kill

    def watch() -> None:
        events.Events(out, point.number, trap).watch()

    return runs.prepared.command(runs.arguments(point.verb, out), watch)[0]
