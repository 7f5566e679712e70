"""The file of results, written after every case; a case that is in it with the same settings is not run again."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import measure, models, parity
from benchmarks.gpu.cases import Case
from diffcr_compile.durable import write_json_atomic

SCHEMA_VERSION = 1
# Not run again unless asked: an executor that crashed may work next time, one that is missing too.
_DONE = {"ok", "mismatch"}


def settings(seconds: float) -> dict[str, Any]:
    """What two measurements of a case must have in common."""
    return {
        "schema_version": SCHEMA_VERSION,
        "precision": {
            "torch": "model.half(), routers float32",
            "ort, trt": "export.precision fp16: products and attention float16, all else float32",
        },
        "depth": {str(width): depth for width, depth in models.DEPTH.items()},
        "head_width": {str(width): heads for width, heads in models.HEAD_WIDTH.items()},
        "seed": models.SEED,
        "most_seconds": seconds,
        "least_rounds": measure.LEAST_ROUNDS,
        "stability": measure.STABILITY,
        "tolerance": {"float16": parity.HALF_TOLERANCE, "float32": parity.WIDE_TOLERANCE},
    }


class Record:
    """Results by case.

    Args:
        path: the JSON file; its cases are kept if they were measured on the same device.
        device: see ``facts.device_facts``.
        versions: of packages.
        chosen: see :func:`settings`.
    """

    def __init__(
        self,
        path: Path,
        device: Mapping[str, Any],
        versions: Mapping[str, str],
        chosen: Mapping[str, Any],
    ) -> None:
        self.path = path
        self._head = {
            "device": dict(device),
            "versions": dict(versions),
            "settings": dict(chosen),
        }
        self.cases: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old["device"]["name"] == device["name"]:
                self.cases = old["cases"]

    def has(self, case: Case) -> bool:
        """Whether a case is there, with the settings and the versions of now."""
        found = self.cases.get(case.key)
        return (
            found is not None
            and found["status"] in _DONE
            and found["settings"] == self._head["settings"]
            and found["versions"] == self._head["versions"]
        )

    def add(self, case: Case, answer: Mapping[str, Any]) -> None:
        """Add a case and write the file."""
        self.cases[case.key] = {
            **dataclasses.asdict(case),
            **answer,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": self._head["settings"],
            "versions": self._head["versions"],
        }
        self.write()

    def leave_out(self, cases: Sequence[Case]) -> None:
        """Say which cases there was no time for."""
        self.left_out = [case.key for case in cases]
        self.write()

    def write(self) -> None:
        """Write the file."""
        data = {**self._head, "cases": self.cases, "left_out": self.left_out}
        write_json_atomic(self.path, data)

    def mismatches(self) -> list[str]:
        """Cases whose answers are wrong."""
        return [key for key, found in self.cases.items() if found["status"] == "mismatch"]
