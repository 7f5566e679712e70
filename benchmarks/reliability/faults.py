"""The disk says no, at every event of every verb: exit 5 with what is needed and free, and nothing is lost.

* *answers*: the system answers one event with "no space left", "read-only file system" or "permission denied",
  in turn; or a file that is opened for reading with "input/output error";
* *full*: the disk really is full from an event on, a small tmpfs that is filled up. Where nothing may be mounted, no
  file of the process may grow any more, which the system refuses in the same way;
* *read-only*: a tmpfs that is mounted read-only between the stages.

After each, every file under its final name is what it was when the fault came, and the same command goes on to the
same hashes once the disk is well. (Running as root, as containers do, makes permission bits no test.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability import events
from benchmarks.reliability.folders import is_loadable, snapshot, torn_files
from benchmarks.reliability.kills import Runs, choose

ANSWERS = (errno.ENOSPC, errno.EROFS, errno.EACCES)
DISK_BYTES = 1 << 25
RESOURCE, ARTIFACT = 5, 7
NEEDED_AND_FREE = re.compile(r"needed [\d.]+ \w+, free [\d.]+ \w+")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One refusal of the disk.

    Attributes:
        kind: answer, read, or full.
        verb: of the command line.
        number: of the event, from 1.
        name: of the event.
        answer: errno.
    """

    kind: str
    verb: str
    number: int
    name: str
    answer: int

    def __str__(self) -> str:
        return f"{self.verb}: {errno.errorcode[self.answer]} ({self.kind}) at event {self.number}, {self.name}"


def all_faults(runs: Runs) -> list[Fault]:
    """An answer to every event, an error for every file that is read, a full disk at every file that is begun."""
    found = []
    for verb in runs.names:
        for index, name in enumerate(runs.names[verb]):
            if name.startswith(("open ", "os.")):
                found.append(Fault("answer", verb, index + 1, name, ANSWERS[index % 3]))
            if (
                name.startswith("open ")
                and name not in runs.names[verb][max(0, index - 2) : index]
            ):
                found.append(Fault("full", verb, index + 1, name, errno.ENOSPC))
        reads = _reads(runs, verb)
        found += [Fault("read", verb, i + 1, name, errno.EIO) for i, name in enumerate(reads)]
    return found


def run(
    runs: Runs, count: int, seed: int = 0, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """`count` of all faults, then the read-only mount."""
    started = time.monotonic()
    every = all_faults(runs)
    by_kind = [
        [fault for fault in every if fault.kind == kind] for kind in ("answer", "read", "full")
    ]
    *others, full = by_kind
    # what users meet most is tried at every file where there is time for it
    chosen = choose(full, count if count >= len(full) else _part(count, full, every), seed)
    for kind in others:
        chosen += choose(kind, _part(count, kind, every), seed)
    outcomes: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with small_disk() as disk:
        for number, fault in enumerate(chosen):
            found, trouble = _one(runs, fault, disk)
            outcomes[found] += 1
            kinds[fault.kind] += 1
            wrong += [f"{fault}: {line}" for line in trouble]
            if number % 20 == 19:
                report(f"{number + 1} of {len(chosen)} faults, {len(wrong)} wrong")
        stages = _read_only(runs, disk) if disk.mounted else None
    if stages is not None:
        wrong += stages
    return {
        "points": len(every), "faults": dict(kinds), "outcomes": dict(sorted(outcomes.items())),
        "mounted": disk.mounted, "read_only_stages": len(runs.names) if disk.mounted else 0, "wrong": wrong,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _part(count: int, kind: Sequence[Fault], every: Sequence[Fault]) -> int:
    """How many of `count` faults are of a kind."""
    return max(1, count * len(kind) // len(every))


class Disk:
    """A folder for artifacts, on a small disk of its own where that is possible."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        self.out = folder / "out"
        self._filler = folder / "filler"

    def fill(self, name: str) -> None:
        """Not a byte is left."""
        if not self.mounted:
            events.no_byte_more(name)
            return
        handle = os.open(self._filler, os.O_WRONLY | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):
            while os.write(handle, b"\0" * (1 << 16)):
                pass
        os.close(handle)

    def empty(self) -> None:
        """As before."""
        self._filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        """``ro`` or ``rw``."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@contextlib.contextmanager
def small_disk() -> Iterator[Disk]:
    """A tmpfs of 32 MiB; a plain folder where nothing may be mounted."""
    with tempfile.TemporaryDirectory(prefix="disk") as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", name]
        try:
            mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        try:
            yield Disk(Path(name), mounted)
        finally:
            if mounted:
                subprocess.run(["umount", name], check=True)


def _one(runs: Runs, fault: Fault, disk: Disk) -> tuple[str, list[str]]:
    """How a run with a fault ended, and what is wrong with that."""
    out, before = disk.out, runs.prepared.scratch / "before.json"
    runs.start(fault.verb, out)
    before.unlink(missing_ok=True)

    def trap(name: str) -> None:
        before.write_text(json.dumps(snapshot(out)))
        if fault.kind == "full":
            disk.fill(name)
        else:
            events.raising(fault.answer)(name)

    def watch() -> None:
        events.Events(out, fault.number, trap, reads=fault.kind == "read").watch()

    status, said = runs.prepared.command(runs.arguments(fault.verb, out), watch)
    disk.empty()
    trouble = [f"torn {name}" for name in torn_files(out)]
    if status == 0:  # what failed was not needed; then the result must be right
        found = "went on"
    else:
        trouble += _refused(fault, status, said)
        found = f"exit {status}"
        # a manifest that is there speaks of whole files, also after a failed export over an old one
        if out.exists() and (out / "manifest.json").exists() and not is_loadable(out):
            trouble.append("a manifest without its files")
        if before.exists() and snapshot(out) != (kept := json.loads(before.read_text())):
            lost = sorted(set(kept.items()) - set(snapshot(out).items()))
            trouble.append(f"not what it was when the disk refused: {lost[:3]}")
    ended = runs.finish(fault.verb, out)
    return found, trouble + ([ended] if ended else [])


def _refused(fault: Fault, status: int, said: str) -> list[str]:
    """What is wrong with the way in which a command was refused."""
    trouble = []
    allowed = {RESOURCE, ARTIFACT} if fault.kind == "read" else {RESOURCE}
    if status not in allowed:
        trouble.append(f"exit {status}: {said[-300:]}")
    if "Traceback" in said or "DCR-" not in said:
        trouble.append(f"not in words: {said[-300:]}")
    if fault.kind == "full" and disk_words(said) is None:
        trouble.append(f"without what is needed and free: {said[-300:]}")
    return trouble


def disk_words(said: str) -> str | None:
    """What is needed and free, as a message says it."""
    found = NEEDED_AND_FREE.search(said)
    return found[0] if found else None


def _read_only(runs: Runs, disk: Disk) -> list[str]:
    """Every verb on a disk that became read-only before it; what is wrong."""
    wrong = []
    for verb in runs.names:
        runs.start(verb, disk.out)
        disk.out.mkdir(exist_ok=True)
        before = snapshot(disk.out)
        disk.remount("ro")
        status, said = runs.prepared.command(runs.arguments(verb, disk.out))
        disk.remount("rw")
        if status != RESOURCE or "Read-only file system" not in said or "Traceback" in said:
            wrong.append(f"read-only before {verb}: exit {status}: {said[-300:]}")
        if snapshot(disk.out) != before:
            wrong.append(f"read-only before {verb}: the folder changed")
        trouble = runs.finish(verb, disk.out)
        wrong += [f"read-only before {verb}: {trouble}"] if trouble else []
    return wrong


def _reads(runs: Runs, verb: str) -> list[str]:
    """The files of the folder that an undisturbed verb opens for reading."""
    out, log = runs.prepared.scratch / "out", runs.prepared.scratch / f"{verb}.reads"
    runs.start(verb, out)
    log.touch()

    def watch() -> None:
        seen = events.Events(out, reads=True)
        seen.log = log
        seen.watch()

    status, said = runs.prepared.command(runs.arguments(verb, out), watch)
    if status != 0:
        raise RuntimeError(f"undisturbed {verb} ended with {status}: {said[-2000:]}")
    return log.read_text(encoding="utf-8").splitlines()
