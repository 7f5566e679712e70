"""One engine to build, as one process hands it to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.engine_plan import EngineSpec
from diffcr_compile.manifest import sha256_file
from diffcr_compile.runtime.engine_files import PlanFile, plan_file, read_plan_file


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """How engines are built.

    Attributes:
        workspace_mb: most scratch memory a tactic may use, in MB; None for TensorRT's own choice.
        compute_capability: such as ``SM86``, to build ahead of time; None to build for this device.
    """

    workspace_mb: int | None = None
    compute_capability: str | None = None


@dataclasses.dataclass(frozen=True)
class BuildJob:
    """One engine to build.

    Attributes:
        spec: which.
        artifact: the artifact's folder.
        folder: where the engine goes.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        settings: how.
        key: hash of all that the engine depends on; an engine with the same key is not built again.
    """

    spec: EngineSpec
    artifact: Path
    folder: Path
    runtime: str
    settings: BuildSettings
    key: str

    @property
    def plan(self) -> Path:
        """The file that is built."""
        return self.folder / plan_file(self.spec.name)

    @property
    def record(self) -> Path:
        """Says that the plan is whole, and of which key it is."""
        return self.folder / f"{self.spec.name}.built.json"

    @property
    def timing_cache(self) -> Path:
        """What TensorRT measured in earlier builds on this device."""
        return self.folder / "timing.cache"

    def finished(self) -> PlanFile | None:
        """The plan, if an earlier build of this very job made it and it is whole; else None."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            found = PlanFile(record["sha256"], record["bytes"])
            whole = record["key"] == self.key and found.bytes == self.plan.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole and sha256_file(self.plan) == found.sha256 else None

    def finish(self, figures: Mapping[str, Any]) -> PlanFile:
        """Record that the plan is whole."""
        found = read_plan_file(self.plan)
        record = {"key": self.key, "sha256": found.sha256, "bytes": found.bytes}
        write_json_atomic(self.record, {**record, **figures})
        return found

    def figures(self) -> dict[str, Any]:
        """What the build recorded beside the plan, such as seconds."""
        found: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return found

    def to_json(self) -> str:
        """As the worker reads it."""
        data = {
            "spec": self.spec.to_json(),
            "artifact": str(self.artifact),
            "folder": str(self.folder),
            "runtime": self.runtime,
            "settings": dataclasses.asdict(self.settings),
            "key": self.key,
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        """What `to_json` wrote."""
        data = json.loads(text)
        return cls(
            spec=EngineSpec.from_json(data["spec"]),
            artifact=Path(data["artifact"]),
            folder=Path(data["folder"]),
            runtime=data["runtime"],
            settings=BuildSettings(**data["settings"]),
            key=data["key"],
        )


def job_key(*parts: Any) -> str:
    """Hash of what an engine depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
