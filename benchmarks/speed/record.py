"""Records of the benchmarks of speed and size: JSON with versions, machine and date."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.runtime.latency import machine
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent.parent / "results"


def write_record(path: Path, result: dict[str, Any]) -> None:
    """Write what was found, with what it was found on."""
    threads = os.environ.get("OMP_NUM_THREADS")
    write_json_atomic(
        path,
        {
            **result,
            "machine": {**machine(), "omp_num_threads": threads, "load": os.getloadavg()[1]},
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
        },
    )


def record_path(name: str, given: Path | None, smoke: bool) -> Path:
    """Where a record goes: a short run is none that a document may quote."""
    if given is not None:
        return given
    return (
        Path(tempfile.gettempdir()) / f"{name}_smoke.json"
        if smoke
        else RESULTS / f"{name}.json"
    )


def read_record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
