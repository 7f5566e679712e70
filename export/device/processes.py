"""One build in a process of its own, and what its end means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffcr_compile
from diffcr_compile import errors
from diffcr_compile.errors import DiffCRError, ResourceError, UnsupportedModelError
from diffcr_compile.export.device.job import BuildJob
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.runtime.engine_files import PlanFile

WORKER = "diffcr_compile.export.device.worker"
_KILLED = {-signal.SIGKILL, 128 + signal.SIGKILL}


def build_in_process(job: BuildJob, progress: PhaseProgress | None = None) -> PlanFile:
    """Build one engine in a process of its own.

    Args:
        job: what to build.
        progress: called with (phase, steps done, steps).

    Raises:
        ResourceError: the process was killed; says what that means.
        UnsupportedModelError: TensorRT refuses the graph, or crashed.
        EnvironmentMissingError: TensorRT cannot be imported.
    """
    log = job.folder / f"{job.spec.name}.build.log"
    failure: dict[str, Any] = {}
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", WORKER, job.to_json()],
            stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said = _parsed(line)
                if "error" in said:
                    failure = said
                elif "phase" in said and progress is not None:
                    progress(said["phase"], said["done"], said["steps"])
            status = process.wait()
        finally:  # also after Ctrl-C: no build goes on behind the user's back
            process.kill()
            process.wait()
    if failure:
        raise _raised(failure)
    if status in _KILLED:
        raise killed(job)
    found = job.finished() if status == 0 else None
    if found is None:
        raise UnsupportedModelError(
            f"the build of {job.spec.name} ended with status {status}. The end of {log}: {_end(log)}",
            code="DCR-M004",
        )
    return found


def killed(job: BuildJob) -> ResourceError:
    """The words for a build that the system ended."""
    return ResourceError(
        f"the build of {job.spec.name} was killed by the system (SIGKILL): memory ran out, nearly always. "
        f"{_memory()} Add swap on a disk or NVMe and switch ZRAM off, stop the desktop (sudo systemctl "
        "isolate multi-user.target), lower --workspace, then run the same command again: it goes on at "
        f"{job.spec.name}, finished engines are kept.",
        code="DCR-R002",
    )


def _memory(meminfo: Path = Path("/proc/meminfo")) -> str:
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        total, swap = (int(rows[key].split()[0]) / 1e6 for key in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError, IndexError):
        return ""
    return f"This machine has {total:.1f} GB of memory and {swap:.1f} GB of swap."


def _environment() -> dict[str, str]:
    """The worker finds this package where this process found it, also inside a zip."""
    root = str(Path(diffcr_compile.__file__).parent.parent)
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *([known] if known else [])])}


def _parsed(line: str) -> dict[str, Any]:
    """A line of the worker; {} for what TensorRT itself prints."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _raised(failure: dict[str, Any]) -> DiffCRError:
    kind = getattr(errors, failure["error"], DiffCRError)
    error: DiffCRError = kind(failure["message"], code=failure["code"])
    return error


def _end(log: Path, characters: int = 600) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return text[-characters:] or "nothing was said"
