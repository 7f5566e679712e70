"""What is known about one model: its entry in the JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.supported_models.settings import ROOT
from diffcr_compile.errors import UnsupportedModelError, plain_text


class Record:
    """What is known about one model so far, on disk after every step, so that a crash loses nothing."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path, self.entry = path, entry
        self.size: dict[str, Any] = {}

    def begin(self, size: int) -> None:
        self.size = {"size": size, "passed": {}, "failures": [], "seconds": {}}
        self.entry["sizes"].append(self.size)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; what it raises is recorded and goes no further."""
        self.entry["running"] = name
        self.write()
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - every failure belongs into the table
            self.fail(name, first_line(error))
            self.size["passed"][name] = False
        self.size["seconds"][name] = round(time.monotonic() - started, 2)
        self.entry["running"] = None
        self.write()

    def fail(self, step: str, error: str) -> None:
        self.size["failures"].append({"step": step, "error": error})

    def require(self, step: str, passed: bool, otherwise: str) -> None:
        """Record whether a step holds; what was recorded before it can only be spoiled."""
        self.size["passed"][step] = passed and self.size["passed"].get(step, True)
        if not passed:
            self.fail(step, otherwise)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.entry, indent=1) + "\n")


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short and without the folders of this machine."""
    lines = [line.strip() for line in plain_text(error).splitlines() if line.strip()]
    if (
        len(lines) > 1
        and lines[0].endswith((":", "."))
        and isinstance(error, UnsupportedModelError)
    ):
        lines[0] = " ".join(lines[:2])  # the first says that, the second why
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return re.sub(r"(?<![\w./])/(?:[\w.@+-]+/)+", "", text)[:400]


def code_hash() -> str:
    """Of everything that a row depends on in this repository."""
    digest = hashlib.sha256()
    folders = ("diffcr_compile", "passes", "export", "tests/zoo", "benchmarks")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
