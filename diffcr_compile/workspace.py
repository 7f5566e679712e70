"""The output folder while it is being made: one run at a time, stages that are done stay done.

Each stage has a key, the fingerprint of all that its result depends on. ``stages.json`` holds key,
seconds and peak memory of every finished stage; a stage with the same key is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcr_compile.data_files import read_json
from diffcr_compile.durable import (
    PARTIAL_SUFFIX,
    atomic_write_bytes,
    disk_errors_in_words,
    remove_leftovers,
)
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.folder_lock import LOCK_FILE, take_lock

STAGES_FILE = "stages.json"
EFFECTIVE_FILE = "effective_config.yaml"
# One of these says that a folder is ours, also where another was deleted because it was damaged.
OWN_FILES = (
    STAGES_FILE,
    EFFECTIVE_FILE,
    "calibration/rollouts.key",
    "calibration/state.safetensors",
)


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
        with disk_errors_in_words(folder):
            check_ours(folder)
            self._lock = take_lock(folder)
            try:
                remove_leftovers(folder)
                self.records: dict[str, dict[str, Any]] = self._read()
            except BaseException:
                self.close()
                raise

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
        """Time a stage and record it if it ends well.

        An earlier record goes first: from here on its files may be replaced, one after the other.
        """
        if self.records.pop(name, None) is not None:
            self._write()
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
        atomic_write_bytes(self.folder / name, text.encode())

    def seconds(self) -> dict[str, float]:
        """Wall seconds of each finished stage."""
        return {name: record["seconds"] for name, record in self.records.items()}

    def peak_rss_bytes(self) -> dict[str, int]:
        """Peak resident memory of each finished stage."""
        return {name: record["peak_rss_bytes"] for name, record in self.records.items()}

    def _read(self) -> dict[str, dict[str, Any]]:
        if (self.folder / STAGES_FILE).exists():
            return read_records(self.folder)
        self.records = {}
        self._write()
        return {}

    def _write(self) -> None:
        self.write_text(STAGES_FILE, json.dumps(self.records, indent=1))


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Key, seconds and peak memory of each stage that was finished in a folder; none where none began.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / STAGES_FILE
    if not path.exists():
        return {}
    try:
        found: Any = read_json(path)
        if not isinstance(found, dict) or not all(map(_is_record, found.values())):
            raise ValueError("it does not hold key, seconds and peak_rss_bytes of each stage")
    except ValueError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Delete it to run every stage again.",
            code="DCR-A002",
        ) from error
    records: dict[str, dict[str, Any]] = found
    return records


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("key"), str)
        and type(record.get("seconds")) in (int, float)
        and type(record.get("peak_rss_bytes")) is int
    )


def check_ours(folder: Path) -> None:
    """Whether an artifact may be written there.

    Raises:
        UsageError: it is no folder, or holds something else than an artifact.
    """
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UsageError(
            f"the artifact cannot be written into {folder}: {above} is a file. Name a new folder.",
            code="DCR-U016",
        )
    if any((folder / name).exists() for name in OWN_FILES):
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    # a run that was killed at its very start leaves these
    foreign = [n for n in names if n != LOCK_FILE and not n.endswith(PARTIAL_SUFFIX)]
    if foreign:
        raise UsageError(
            f"{folder} is not empty and was not made by diffcr ({', '.join(foreign[:5])}). "
            "Name a new folder.",
            code="DCR-U016",
        )


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
