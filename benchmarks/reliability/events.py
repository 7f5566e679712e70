"""What a run does to a folder, event by event, and a trap that springs before one of them.

An event is a file opened for writing (or, if asked, for reading), renamed, deleted, made, forced to the disk, a
folder made or deleted, or a step of rollouts, calibration or export finished.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffcr_compile.commands.terminal import Terminal

NAMES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.chmod",
}
WRITING = os.O_WRONLY | os.O_RDWR
Trap = Callable[[str], None]


class Events:
    """Counts what happens to a folder, and calls a trap before the n-th event.

    Args:
        folder: only what lies below it counts.
        at: number of the event, from 1; None for none.
        trap: what happens then; it gets the event's name.
        reads: count files opened for reading instead of everything else.

    Attributes:
        names: of all events so far.
    """

    def __init__(
        self,
        folder: Path,
        at: int | None = None,
        trap: Trap | None = None,
        reads: bool = False,
    ) -> None:
        self.folder, self.at, self.trap, self.reads = str(folder), at, trap, reads
        self.names: list[str] = []
        self.log: Path | None = None

    def watch(self) -> None:
        """From now on, until this process ends: an audit hook cannot be taken off."""
        sys.addaudithook(self._audit)
        if self.reads:
            return
        real_fsync, real_event = os.fsync, Terminal.event

        def fsync(handle: int) -> None:
            self._path("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
            real_fsync(handle)

        def event(terminal: Terminal, kind: str, **fields: Any) -> None:
            real_event(terminal, kind, **fields)
            if kind == "progress":
                self._happens(f"{fields['stage']} {fields['done']}/{fields['count']}")

        os.fsync = fsync  # in a fork, which ends with what it was made for
        Terminal.event = event  # type: ignore[method-assign]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = bool((arguments[2] or 0) & WRITING)
            if writes != self.reads:
                self._path("read" if self.reads else "open", arguments[0])
        elif event in NAMES and not self.reads:
            self._path(event, arguments[0])

    def _path(self, event: str, path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder):
            self._happens(f"{event} {_stable(os.path.relpath(path, self.folder))}")

    def _happens(self, name: str) -> None:
        self.names.append(name)
        if self.log is not None:
            log, self.log = self.log, None  # its own write is no event
            with log.open("a", encoding="utf-8") as file:
                file.write(name + "\n")
            self.log = log
        if len(self.names) == self.at and self.trap is not None:
            self.trap(name)


def _stable(path: str) -> str:
    """A path without the random part of a temporary name."""
    parts = path.split(".")
    if parts[-1] == "partial" and len(parts) > 2:
        return ".".join([*parts[:-2], parts[-1]])
    return path


def kill(_: str) -> None:
    """SIGKILL: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_next_write(_: str) -> None:
    """The kernel ends the process inside of the write that crosses the seventh byte of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, resource.RLIM_INFINITY))


def raising(number: int) -> Trap:
    """The system answers this one event with an error."""

    def trap(_: str) -> None:
        raise OSError(number, os.strerror(number))

    return trap


def no_byte_more(_: str) -> None:
    """From now on no file of this process grows: a full disk without a disk of one's own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
