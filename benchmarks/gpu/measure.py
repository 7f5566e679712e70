"""Latency in turns until the speed-up is known, and memory of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from diffcr_compile.runtime.timing import summarise, worst_error

Run = Callable[[], object]
WARM_UP_CALLS = 5
LEAST_ROUNDS = 30
LEAST_SECONDS = 0.3
STABILITY = 0.01  # standard error of the median ratio, as a part of it
DENSE, COMPRESSED = "dense", "compressed"


def synchronize() -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def latency(runs: Mapping[str, Run], most_seconds: float) -> dict[str, Any]:
    """Time ``dense`` and ``compressed`` in turns, each from the call until the device is done.

    Args:
        runs: by name; each call is one unit of work.
        most_seconds: after which the figures count as not stable.

    Returns:
        Milliseconds (p50, p90), the median of the ratios of each turn, its standard error, and whether
        that is within ``STABILITY``.
    """
    for run in runs.values():
        for _ in range(WARM_UP_CALLS):
            run()
        synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    rounds = 0
    while True:
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
        rounds += 1
        passed = time.perf_counter() - started
        if passed >= most_seconds:
            break
        if rounds >= LEAST_ROUNDS and rounds % 10 == 0 and passed >= LEAST_SECONDS:
            timings = summarise(seconds, DENSE)
            if worst_error(timings, COMPRESSED) <= STABILITY:
                break
    share = summarise(seconds, DENSE)[COMPRESSED]
    error = share.error / share.share
    return {
        **{name: _percentiles(values) for name, values in seconds.items()},
        "rounds": rounds,
        "speed_up": 1 / share.share,
        "relative_error": error,
        "stable": rounds >= LEAST_ROUNDS and error <= STABILITY,
    }


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def _percentiles(seconds: list[float]) -> dict[str, Any]:
    milliseconds = 1000 * np.array(seconds)
    middle, high = np.percentile(milliseconds, [50, 90])
    return {"p50_ms": float(middle), "p90_ms": float(high), "samples": len(seconds)}


class MemoryWatch:
    """What making an engine and calling it takes of the device's memory, in bytes.

    ``resident`` is read from CUDA and counts every process, ``allocated`` and ``peak`` from torch and
    count its own tensors only.
    """

    def __init__(self) -> None:
        self._watching = torch.cuda.is_available()
        self._free, self._allocated = self._now()

    def of(self, run: Run) -> dict[str, int] | None:
        """Since this watch was made, and in one call of `run`; None on a CPU."""
        if not self._watching:
            return None
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        free, allocated = self._now()
        return {
            "resident_bytes": self._free - free,
            "allocated_bytes": allocated - self._allocated,
            "peak_of_a_call_bytes": torch.cuda.max_memory_allocated() - before,
        }

    def _now(self) -> tuple[int, int]:
        if not self._watching:
            return 0, 0
        synchronize()
        return torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
