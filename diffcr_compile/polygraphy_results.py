"""Golden inputs for Polygraphy, and what Polygraphy's runners gave, compared with the golden outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import UsageError
from diffcr_compile.export.device.check import tolerance_of
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.parity import compare
from diffcr_compile.manifest import read_manifest, verify_artifact
from diffcr_compile.runtime.polygraphy_json import read_outputs, write_inputs, write_outputs

Array = npt.NDArray[Any]


def write_polygraphy(artifact: Path, folder: Path) -> list[Path]:
    """Write ``bucket_XX_inputs.json`` and ``bucket_XX_outputs.json`` of every timestep bucket.

    Args:
        artifact: the artifact's folder.
        folder: made if it does not exist.

    Raises:
        ArtifactError: a golden file is missing or changed.
    """
    manifest = read_manifest(artifact)
    verify_artifact(artifact, manifest, only=("golden",))
    names = [spec["name"] for spec in manifest.outputs]
    written = []
    for bucket in manifest.buckets:
        inputs, outputs = read_golden(artifact / bucket["golden"])
        stem = f"bucket_{bucket['index']:02d}"
        paths = [folder / f"{stem}_inputs.json", folder / f"{stem}_outputs.json"]
        write_inputs(paths[0], [inputs])
        write_outputs(paths[1], "golden", [dict(zip(names, outputs, strict=True))])
        written += paths
    return written


def compare_results(artifact: Path, results: Path, bucket: int) -> list[dict[str, Any]]:
    """Results that Polygraphy saved against the golden outputs; a row per runner and call.

    Args:
        artifact: the artifact's folder.
        results: the file of ``--save-outputs``.
        bucket: the timestep bucket whose golden inputs were run.

    Raises:
        UsageError: the file holds no results, or other outputs than the artifact's.
        ArtifactError: a golden file is missing or changed.
    """
    manifest = read_manifest(artifact)
    verify_artifact(artifact, manifest, only=("golden",))
    if not 0 <= bucket < len(manifest.buckets):
        raise UsageError(
            f"there is no timestep bucket {bucket}, they are 0 to {len(manifest.buckets) - 1}"
        )
    expected = read_golden(artifact / manifest.buckets[bucket]["golden"])[1]
    names = [spec["name"] for spec in manifest.outputs]
    tolerance = tolerance_of(manifest)
    rows = []
    for runner, calls in read_outputs(results).items():
        for number, call in enumerate(calls):
            found = _in_order(results, call, names)
            row = compare(f"golden -> {runner}", found, expected, np.inf, bucket)
            passed = row.non_finite == 0 and row.rel_l2 <= tolerance
            figures = {"rel_l2": row.rel_l2, "max_abs": row.max_abs, "cosine": row.cosine}
            rows.append(
                {
                    "bucket": bucket,
                    "runner": runner,
                    "call": number,
                    **figures,
                    "non_finite": row.non_finite,
                    "tolerance": tolerance,
                    "passed": passed,
                }
            )
    return rows


def _in_order(path: Path, call: Mapping[str, Array], names: list[str]) -> list[Array]:
    missing = [name for name in names if name not in call]
    if missing:
        raise UsageError(
            f"{path} has the outputs {sorted(call)}, the artifact {names}; run the artifact's own graph"
        )
    return [call[name] for name in names]
