"""Check an artifact without torch: hashes, then ONNX Runtime against the golden outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcr_compile.errors import AccuracyError, EnvironmentMissingError
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.parity import Parity, compare, compare_open_graph, run_onnx
from diffcr_compile.manifest import Manifest, read_manifest, verify_artifact

if TYPE_CHECKING:
    from diffcr_compile.export.bisect import Suspect

# Relative L2 of what leaves a block, between two machines that run the same float32 graph.
BISECT_TOLERANCE = 1e-4


def validate_artifact(folder: Path, bisect: bool = False) -> list[dict[str, Any]]:
    """Parity of every timestep bucket with the outputs that FROZEN gave on the host.

    Graphs that serve several buckets are run at each of theirs.

    Args:
        folder: the artifact.
        bisect: name the first block whose output is off, if a bucket is.

    Raises:
        ArtifactError: a file is missing or changed.
        AccuracyError: a bucket differs by more than the tolerance in the manifest.
        EnvironmentMissingError: the graphs are in bf16 and onnx is not installed.
    """
    manifest = read_manifest(folder)
    verify_artifact(folder, manifest)
    gate = manifest.parity["tolerance"], manifest.parity["measure"]
    rows: list[Parity] = []
    for bucket in manifest.buckets:
        inputs, outputs = read_golden(folder / bucket["golden"])
        with _runnable(folder / bucket["onnx"], manifest) as file:
            found = run_onnx(file, inputs)
        row = compare(
            "golden -> ONNX Runtime",
            found,
            outputs,
            gate[0],
            bucket["index"],
            gate[1],
        )
        rows.append(row)
    for graph in manifest.profile_graphs:
        step = f"golden -> ONNX Runtime, {graph['onnx']}"
        if graph["kept_inputs"]:  # else it is the graph of its bucket
            with _runnable(folder / graph["onnx"], manifest) as file:
                rows += compare_open_graph(
                    folder, graph, manifest.schedule, step, gate, path=file
                )
    for row in rows:
        if not row.passed:
            where = _suspect(folder, manifest, row.bucket) if bisect else ""
            raise AccuracyError(
                f"bucket {row.bucket} of {folder} ({row.step}) differs from its golden outputs by "
                f"{row.max_abs:.1e} ({row.non_finite} values NaN or infinite), allowed {gate[0]:.0e}"
                f"{where}",
                code="DCR-Q001",
            )
    return [dataclasses.asdict(row) for row in rows]


def validate_engines(
    folder: Path, bisect: bool = False, runtime: str = "tensorrt"
) -> list[dict[str, Any]]:
    """Figures of this device's engines against the golden outputs; if all agree they may be used.

    Args:
        folder: the artifact.
        bisect: where a bucket is off, build engines of parts of the graph and name the first block that
            is.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        ArtifactError: there are no engines that may run here.
        AccuracyError: a bucket is off.
        EnvironmentMissingError: there is no GPU or no TensorRT; for `bisect`, no onnx.
    """
    from diffcr_compile.export.device.check import check_here, tolerance_of

    manifest = read_manifest(folder)
    try:
        return check_here(folder, manifest, runtime)
    except AccuracyError as error:
        if not bisect:
            raise
        verify_artifact(folder, manifest)
        from diffcr_compile.export.bisect import bisect_engine

        tolerance = tolerance_of(manifest)
        for bucket in manifest.buckets:
            found = bisect_engine(folder, manifest, bucket["index"], tolerance, runtime)
            if found is not None:
                raise AccuracyError(
                    f"{error.message} {_words(found)}", code=error.code
                ) from error
        raise AccuracyError(
            f"{error.message} Engines of parts of the graphs are right at every block: it is what comes "
            "after the last block, or a fusion over all of them.",
            code=error.code,
        ) from error


def _runnable(path: Path, manifest: Manifest) -> contextlib.AbstractContextManager[Path]:
    """The graph, or what stands in for it while the context lasts where a CPU has no kernels for its types."""
    if manifest.runs_on_cpu:
        return contextlib.nullcontext(path)
    try:
        from diffcr_compile.export.widened import for_cpu
    except ImportError as error:
        raise EnvironmentMissingError(
            f"an artifact in {manifest.precision['type']} is checked on a CPU with the package onnx ({error}). "
            "Check it on the host, or its engines here."
        ) from error
    return for_cpu(path, manifest)


def _suspect(folder: Path, manifest: Manifest, bucket: int | None) -> str:
    from diffcr_compile.export.bisect import bisect_onnx

    found = bisect_onnx(folder, manifest, bucket or 0, BISECT_TOLERANCE)
    if found is None:
        return ". What leaves every block is right: it is what comes after the last one"
    return f". {_words(found)}"


def _words(found: Suspect) -> str:
    off = (
        "NaN or infinite"
        if math.isinf(found.rel_l2)
        else f"off by {found.rel_l2:.1e} of its norm"
    )
    return (
        f"The first block that is off is {found.block!r}: {found.value}, which {found.node} makes, is {off} "
        f"(golden inputs of bucket {found.bucket})."
    )
