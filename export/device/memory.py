"""What engines need of a device's memory, before one is built or loaded.

The figures are estimates: weights are exact, scratch memory comes from the graph (``export/activation_memory.py``),
the peak of a build from one measurement with TensorRT-RTX. What CUDA, TensorRT and Python take themselves
is not in them, because it was not measured on a board.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.engine_plan import EnginePlan
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.device_buffers import tensor_bytes

# Peak of a build / bytes of weights, TensorRT-RTX 1.7 at 676 M parameters; the shipped targets say the same.
BUILD_FACTOR = 3.3
# Beside the values of the graph: TensorRT-RTX 1.7 asked for this much in every build that was tried, and for
# 0.5 to 1.0 times the largest sum of living values on top (tests/test_device_memory.py).
FIXED_ACTIVATION = 8 << 20
# Where the export writes that sum for each timestep bucket.
ACTIVATIONS = "model/activation_memory.json"


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that engines need.

    Attributes:
        weights: of one copy.
        copies: how often they lie in memory when all engines are loaded.
        activations: scratch memory, shared by all timestep buckets.
        tensors: inputs and outputs.
        build: peak of the process that builds the largest engine.
    """

    weights: int
    copies: int
    activations: int
    tensors: int
    build: int

    @property
    def loaded(self) -> int:
        """With all engines in memory."""
        return self.weights * self.copies + self.activations + self.tensors

    @property
    def swapped(self) -> int:
        """With one engine in memory."""
        return self.weights + self.activations + self.tensors

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        figures = {"loaded": self.loaded, "swapped": self.swapped}
        return {**dataclasses.asdict(self), **figures}


def memory_need(
    manifest: Manifest,
    plan: EnginePlan,
    activations: Sequence[int],
    build_factor: float = BUILD_FACTOR,
) -> MemoryNeed:
    """Estimate from the manifest and the plan.

    Args:
        manifest: of the artifact.
        plan: the engines.
        activations: what :func:`read_activations` found.
        build_factor: peak of a build / bytes of weights.
    """
    weights = int(manifest.files[manifest.weights]["bytes"])
    tensors = sum(
        tensor_bytes(spec["shape"], spec["dtype"])
        for spec in (*manifest.inputs, *manifest.outputs)
    )
    largest = FIXED_ACTIVATION + max(activations, default=0)
    return MemoryNeed(
        weights=weights,
        copies=len(plan.engines),
        activations=largest,
        tensors=tensors,
        build=round(build_factor * weights) + largest + tensors,
    )


def read_activations(artifact: Path, fused: bool = False) -> list[int]:
    """Largest sum of living values of each timestep bucket, as the export found it out; none if it did not.

    Args:
        artifact: the artifact's folder.
        fused: whether attention keeps no score matrix on the device.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = artifact / ACTIVATIONS
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [int(row["fused" if fused else "plain"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Copy the artifact again, or make it anew with diffcr compile.",
            code="DCR-A004",
        ) from error


def verdicts(need: MemoryNeed, available: int | None, swap: int = 0) -> list[str]:
    """What will fail with this much memory, in sentences; nothing if all fits.

    Args:
        need: of the engines.
        available: bytes that a program can get; None if it is not known.
        swap: bytes of swap on a disk. A build may use it, a loaded engine may not.
    """
    if available is None:
        return []
    found = []
    if need.build > available + swap:
        found.append(
            f"diffcr build and build_on_device.sh need about {_gb(need.build)}, {_gb(available)} are "
            f"available and {_gb(swap)} of swap on a disk: the build will be killed. Add swap, stop the "
            "desktop, lower --workspace."
        )
    if need.swapped > available:
        found.append(
            f"loading needs {_gb(need.swapped)} even with swap=True, {_gb(available)} are available: it "
            "will fail. Compile a smaller batch or model, or use half precision."
        )
    elif need.loaded > available:
        found.append(
            f"loading all engines needs {_gb(need.loaded)}, {_gb(available)} are available: it will "
            f"fail. Load with swap=True ({_gb(need.swapped)}), or build with --mode profiles."
        )
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
