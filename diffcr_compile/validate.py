"""Check an artifact without torch: hashes, then ONNX Runtime against the golden outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffcr_compile.errors import AccuracyError
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.parity import Parity, compare, compare_open_graph, run_onnx
from diffcr_compile.manifest import read_manifest, verify_artifact


def validate_artifact(folder: Path) -> list[dict[str, Any]]:
    """Parity of every timestep bucket with the outputs that FROZEN gave on the host.

    Graphs that serve several buckets are run at each of theirs.

    Raises:
        ArtifactError: a file is missing or changed.
        AccuracyError: a bucket differs by more than the tolerance in the manifest.
    """
    manifest = read_manifest(folder)
    verify_artifact(folder, manifest)
    tolerance = manifest.parity["tolerance"]
    rows: list[Parity] = []
    for bucket in manifest.buckets:
        inputs, outputs = read_golden(folder / bucket["golden"])
        found = run_onnx(folder / bucket["onnx"], inputs)
        row = compare(
            "golden -> ONNX Runtime", found, outputs, tolerance, bucket=bucket["index"]
        )
        rows.append(row)
    for graph in manifest.profile_graphs:
        step = f"golden -> ONNX Runtime, {graph['onnx']}"
        rows += compare_open_graph(folder, graph, manifest.schedule, step, tolerance)
    for row in rows:
        if not row.passed:
            raise AccuracyError(
                f"bucket {row.bucket} of {folder} ({row.step}) differs from its golden outputs by "
                f"{row.max_abs:.1e} ({row.non_finite} values NaN or infinite), allowed {tolerance:.0e}",
                code="DCR-Q001",
            )
    return [dataclasses.asdict(row) for row in rows]
