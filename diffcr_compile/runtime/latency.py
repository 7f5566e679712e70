"""What each routed block costs by kept tokens, measured: the latency table that budgets are solved over.

Every figure is a share of the whole dense model's time in the same round, see ``timing.py``.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.runtime.timing import Timing, in_turns, worst_error

SCHEMA_VERSION = 1
CHECKSUM = "sha256"
STABILITY = 0.02
MOST_ROUNDS = 60
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class MeasuredGroup:
    """Blocks of equal structure, ready to run.

    Attributes:
        blocks: their names.
        runs: kept tokens -> one call; the largest is the dense block, 0 is not run.
    """

    blocks: tuple[str, ...]
    runs: Mapping[int, Run]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, ready to be measured.

    Attributes:
        model: name, fingerprint and batch.
        groups: every routed block in one of them.
        dense: one call of the whole dense model.
        check: one call of the whole model at `check_kept`.
        check_kept: block -> kept tokens, neither all nor none.
    """

    model: Mapping[str, Any]
    groups: Sequence[MeasuredGroup]
    dense: Run
    check: Run
    check_kept: Mapping[str, int]


def measure(
    subject: Subject,
    backend: Mapping[str, Any],
    stability: float = STABILITY,
    most_rounds: int = MOST_ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The latency table of a model, as JSON has it.

    Args:
        subject: what is measured.
        backend: name, device and threads, for the record.
        stability: standard error that a level may have, as a part of its dense block's time.
        most_rounds: after which a table is written that says that it is not stable.
        progress: called with (groups done, all groups).
    """
    groups, worst, dense_seconds = [], 0.0, list[float]()
    for number, group in enumerate(subject.groups):
        largest = str(max(group.runs))
        runs = {"model": subject.dense, **{str(k): run for k, run in group.runs.items()}}
        timings = in_turns(runs, "model", stability, most_rounds, scale=largest)
        worst = max(worst, worst_error(timings, largest))
        dense_seconds += timings.pop("model").seconds
        groups.append((group, timings))
        if progress:
            progress(number + 1, len(subject.groups))
    dense = 1000 * statistics.median(dense_seconds)
    table = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": _versions(),
        "backend": dict(backend),
        "model": dict(subject.model),
        "dense_milliseconds": dense,
        "groups": [_row(group, timings, dense) for group, timings in groups],
        "check": _check(subject, groups, dense, stability, most_rounds),
        "stability": stability,
        "worst_error": worst,
        "stable": worst <= stability,
    }
    return {**table, CHECKSUM: checksum(table)}


def checksum(table: Mapping[str, Any]) -> str:
    """Over everything else that a table says."""
    data = {name: value for name, value in table.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _row(group: MeasuredGroup, timings: Mapping[str, Timing], dense: float) -> dict[str, Any]:
    levels = sorted(group.runs)
    found = [timings[str(level)] for level in levels]
    return {
        "blocks": list(group.blocks),
        "levels": levels,
        "milliseconds": [dense * timing.share for timing in found],
        "errors": [dense * timing.error for timing in found],
        "rounds": len(found[0].seconds),
    }


def _check(
    subject: Subject,
    groups: Sequence[tuple[MeasuredGroup, Mapping[str, Timing]]],
    dense: float,
    stability: float,
    most_rounds: int,
) -> dict[str, Any]:
    """Whether the blocks add up: the whole model at other kept tokens, as predicted and as measured."""
    share = 1.0
    for group, timings in groups:
        for block in group.blocks:
            whole, part = max(group.runs), subject.check_kept[block]
            share -= timings[str(whole)].share - timings[str(part)].share
    runs = {"model": subject.dense, "check": subject.check}
    measured = in_turns(runs, "model", stability, most_rounds)["check"]
    return {
        "kept_tokens": dict(subject.check_kept),
        "predicted_milliseconds": dense * share,
        "measured_milliseconds": dense * measured.share,
    }


def machine() -> dict[str, Any]:
    """System, processor and cores."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
    }


def _processor() -> str:
    """The processor's name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("diffcr-compile", "onnxruntime", "onnxruntime-gpu", "numpy", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
