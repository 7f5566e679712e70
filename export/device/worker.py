"""Builds one engine in a process of its own: ``python -m diffcr_compile.export.device.worker JOB``.

TensorRT keeps memory after a build, and a build that runs out of it is ended by the system; neither must
touch the next engine. It prints one JSON object per line: progress, then a result or an error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import DiffCRError
from diffcr_compile.export.device.job import BuildJob
from diffcr_compile.export.device.tensorrt_api import build_engine
from diffcr_compile.runtime.device import tensorrt_module


def main() -> int:
    """Build what the first argument describes."""
    job = BuildJob.from_json(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _build(job)
    except DiffCRError as error:
        _say(error=type(error).__name__, message=error.message, code=error.code)
        return error.exit_code
    return 0


def _build(job: BuildJob) -> None:
    started = time.monotonic()
    ahead = job.settings.compute_capability is not None
    data = build_engine(
        tensorrt_module(job.runtime),
        job.artifact / job.spec.onnx,
        job.spec.bounds(),
        job.settings,
        timing_cache=None if ahead else job.timing_cache,
        progress=lambda phase, done, steps: _say(phase=phase, done=done, steps=steps),
    )
    atomic_write_bytes(job.plan, data)
    job.finish({"seconds": round(time.monotonic() - started, 3)})


def _end_with_parent() -> None:
    """A build must not go on when nobody waits for it: the next one would need the memory twice."""
    sys.stdin.read()
    os._exit(1)


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main())
