"""What a compilation gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime import Runner, load
from diffcr_compile.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model on disk.

    Attributes:
        folder: where it is.
        manifest: what was built; None where a compilation was stopped before.
        report: the report as a dict; None where a compilation was stopped before.
    """

    folder: Path
    manifest: Manifest | None = None
    report: Mapping[str, Any] | None = None

    def load(self, **options: Any) -> Runner:
        """A runner for it, see ``diffcr_compile.runtime``."""
        return load(self.folder, **options)


def stopped(space: Workspace, ranks: Ranks, manifest: Manifest | None = None) -> Artifact:
    """A compilation that ends before its report; the other ranks wait for this one."""
    ranks.wait_for_leader()
    return Artifact(space.folder, manifest)
