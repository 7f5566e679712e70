"""The output folder while it is being made: one run at a time, stages that are done stay done.

Each stage has a key, the fingerprint of all that its result depends on. ``stages.json`` holds key,
seconds and peak memory of every finished stage; a stage with the same key is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from diffcr_compile.errors import ArtifactError, ResourceError, UsageError

STAGES_FILE = "stages.json"


class Workspace:
    """An output folder, locked for this process.

    Args:
        folder: made if it does not exist.

    Raises:
        UsageError: another process works in it, or it holds something else than an artifact.
        ResourceError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = [p.name for p in folder.iterdir()]
            if foreign and not (folder / STAGES_FILE).exists() and ".lock" not in foreign:
                raise UsageError(
                    f"{folder} is not empty and was not made by diffcr ({', '.join(sorted(foreign)[:5])}). "
                    "Name a new folder.",
                    code="DCR-U016",
                )
            self._lock: IO[str] = (folder / ".lock").open("w")
        except OSError as error:
            raise ResourceError(
                f"{folder} cannot be written: {error}", code="DCR-R001"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                f"another diffcr run is at work in {folder}; wait for it or name another folder",
                code="DCR-U017",
            ) from None
        self.records: dict[str, dict[str, Any]] = self._read()

    def close(self) -> None:
        """Let others into the folder."""
        self._lock.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, stage: str, key: str) -> bool:
        """Whether this very stage was finished earlier."""
        record = self.records.get(stage)
        return record is not None and record["key"] == key

    @contextlib.contextmanager
    def stage(self, name: str, key: str) -> Iterator[None]:
        """Time a stage and record it if it ends well."""
        _reset_peak_memory()
        started = time.monotonic()
        yield
        self.records[name] = {
            "key": key,
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": _peak_memory(),
        }
        self._write()

    def subfolder(self, name: str) -> Path:
        """A folder inside the artifact, made if needed."""
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the artifact, all of it or nothing."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def seconds(self) -> dict[str, float]:
        """Wall seconds of each finished stage."""
        return {name: record["seconds"] for name, record in self.records.items()}

    def peak_rss_bytes(self) -> dict[str, int]:
        """Peak resident memory of each finished stage."""
        return {name: record["peak_rss_bytes"] for name, record in self.records.items()}

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / STAGES_FILE
        if not path.exists():
            self.records = {}
            self._write()
            return {}
        try:
            records: dict[str, dict[str, Any]] = json.loads(path.read_text())
        except ValueError as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}. Delete it to run every stage again.",
                code="DCR-A002",
            ) from error
        return records

    def _write(self) -> None:
        path = self.folder / STAGES_FILE
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.records, indent=1))
        temporary.replace(path)


def fingerprint(*parts: Any) -> str:
    """sha256 over JSON-able parts, in order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not on Linux, or not allowed: peaks then accumulate
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Peak resident set of this process in bytes, since the last reset where the system can."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
