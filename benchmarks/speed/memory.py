"""Peak and present memory of this process, in bytes, as Linux counts it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMAPS = Path("/proc/self/smaps_rollup")


def read(key: str, path: Path = STATUS) -> int:
    """A line of the kernel's account: ``VmRSS``, ``VmHWM`` (peak), ``RssAnon`` (not backed by a file)."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return 0


def private() -> int:
    """Pages that this process alone has, and its share of the others: each page counts once."""
    return read("Pss", SMAPS)


class PrivatePeak:
    """Most memory with no file behind it since it was last asked for, looked at 20 times a second."""

    def __init__(self) -> None:
        self._most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> int:
        """The peak in bytes; the next one counts from now on."""
        found, self._most = max(self._most, read("RssAnon")), 0
        return found

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, read("RssAnon"))
            time.sleep(0.05)


class Stage:
    """Seconds, those of the processor, and peak memory of a stage, filled when it ends."""

    seconds = 0.0
    processor = 0.0
    peak = 0
    after = 0


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Measure what runs in the context; the peak counts from its start."""
    found = Stage()
    RESET.write_text("5")
    started, used = time.perf_counter(), time.process_time()
    yield found
    found.seconds = time.perf_counter() - started
    found.processor = time.process_time() - used
    found.peak, found.after = read("VmHWM"), read("VmRSS")
