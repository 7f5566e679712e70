"""The comparison that makes engines usable: every timestep bucket against its golden outputs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import AccuracyError, ArtifactError
from diffcr_compile.export.device.builder import adopt_unchecked
from diffcr_compile.export.device.layer_map import write_layers
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.parity import Parity, compare
from diffcr_compile.folder_lock import locked
from diffcr_compile.manifest import Manifest, verify_artifact
from diffcr_compile.runtime.complex_inputs import as_graph_tensor, tensor_words
from diffcr_compile.runtime.engine_files import ENGINES, read_sidecar, take_ok_back, write_ok
from diffcr_compile.runtime.find_engines import none_for
from diffcr_compile.runtime.open_engines import open_device, open_unchecked

Array = npt.NDArray[Any]
# Relative L2 from the golden outputs, which FROZEN gave in float32. Half precision has 11 bits: products of
# thousands of terms through tens of blocks end near 1e-3 (the fp16 graphs of the reference model: see
# docs/jetson.md), and a token that swaps at the cut adds some. An engine that is wrong is off by 0.1 and more.
HALF_TOLERANCE = 2e-2
FLOAT_TOLERANCE = 1e-3
# Plain, then while the work is recorded, then replayed: the three ways in which a context runs.
_RUNS = 3


class Backend(Protocol):
    """What runs a timestep bucket."""

    def run(self, bucket: int, arrays: Mapping[str, Array]) -> list[Array]: ...


def tolerance_of(manifest: Manifest) -> float:
    """Largest relative L2 of an engine of this artifact: by the type that its graphs compute in."""
    if manifest.precision["type"] == "fp32":
        return FLOAT_TOLERANCE
    return max(HALF_TOLERANCE, float(manifest.parity["tolerance"]))


def compare_with_golden(
    backend: Backend, artifact: Path, manifest: Manifest, tolerance: float
) -> list[dict[str, Any]]:
    """Every timestep bucket against its golden outputs; a row of figures each.

    Args:
        backend: runs the buckets.
        artifact: the artifact's folder.
        manifest: of it.
        tolerance: largest relative L2.

    Raises:
        ArtifactError: a golden file does not hold the inputs that the manifest says.
    """
    rows = []
    for bucket in manifest.buckets:
        inputs, expected = read_golden(artifact / bucket["golden"])
        _check_inputs(artifact / bucket["golden"], inputs, manifest)
        runs = [backend.run(bucket["index"], inputs) for _ in range(_RUNS)]
        found = [_row(outputs, expected, tolerance, bucket["index"]) for outputs in runs]
        rows.append(max(found, key=lambda row: (row["non_finite"], row["rel_l2"])))
    return rows


def check_engines(
    artifact: Path,
    manifest: Manifest,
    folder: Path,
    runtime: str,
    tolerance: float,
    backend: Backend | None = None,
) -> list[dict[str, Any]]:
    """Compare the engines of a folder with the golden outputs; write ``layers.json`` and ``engine.ok.json``.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        folder: of the engines; its sidecar is there.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        tolerance: largest relative L2.
        backend: that runs these engines; None to open them.

    Raises:
        ArtifactError: a golden file, or what belongs to the model, is not the one that the manifest lists.
        AccuracyError: a bucket is further off, or gives NaN or infinite values. There is no
            ``engine.ok.json`` then.
        UsageError: a build or another check is at work in the folder.
    """
    with locked(folder):  # what is compared is what lies there until it is said to be right
        return _check_locked(artifact, manifest, folder, runtime, tolerance, backend)


def _check_locked(
    artifact: Path,
    manifest: Manifest,
    folder: Path,
    runtime: str,
    tolerance: float,
    backend: Backend | None,
) -> list[dict[str, Any]]:
    take_ok_back(folder)
    # what engines are held to must be the artifact's own, whoever asks for the check
    verify_artifact(artifact, manifest, only=("golden", "model"))
    opened = open_unchecked(folder, manifest, runtime) if backend is None else None
    try:
        sidecar = read_sidecar(folder) if opened is None else opened.sidecar
        rows = compare_with_golden(opened or _given(backend), artifact, manifest, tolerance)
        if opened is not None:
            write_layers(artifact, folder, sidecar.plan, opened)
    finally:
        if opened is not None:
            opened.close()
    wrong = [row for row in rows if not row["passed"]]
    if wrong:
        raise _refusal(folder, wrong, len(rows))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_ok(folder, sidecar, rows, now)
    return rows


def check_here(
    artifact: Path, manifest: Manifest, runtime: str = "tensorrt"
) -> list[dict[str, Any]]:
    """Compare what is there for this device, also what ``build_on_device.sh`` just built.

    Raises:
        ArtifactError: there are no engines that may run here.
        AccuracyError: they do not give the golden outputs.
    """
    here = open_device(runtime)[2]
    adopt_unchecked(artifact, manifest, here)
    folder = artifact / ENGINES / here.folder
    if not folder.is_dir():
        raise none_for(artifact, here)
    return check_engines(artifact, manifest, folder, runtime, tolerance_of(manifest))


def _check_inputs(path: Path, inputs: Mapping[str, Array], manifest: Manifest) -> None:
    """Raise ArtifactError unless golden inputs fill exactly the buffers that an engine reads."""
    wanted = {spec["name"]: as_graph_tensor(spec) for spec in manifest.inputs}
    found = {name: (array.shape, array.dtype.name) for name, array in inputs.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise ArtifactError(
            f"{path} has as input {name} {tensor_words(found.get(name))}, the manifest says "
            f"{tensor_words(wanted.get(name))}. Copy the artifact again, or make it anew with diffcr compile.",
            code="DCR-A004",
        )


def _given(backend: Backend | None) -> Backend:
    assert backend is not None
    return backend


def _row(
    found: Sequence[Array], expected: Sequence[Array], tolerance: float, bucket: int
) -> dict[str, Any]:
    row: Parity = compare("golden -> engine", found, expected, np.inf, bucket)
    return {
        "bucket": bucket,
        "rel_l2": row.rel_l2,
        "max_abs": row.max_abs,
        "cosine": row.cosine,
        "non_finite": row.non_finite,
        "tolerance": tolerance,
        "passed": row.non_finite == 0 and row.rel_l2 <= tolerance,
    }


def _refusal(folder: Path, wrong: Sequence[Mapping[str, Any]], count: int) -> AccuracyError:
    worst = wrong[0]
    return AccuracyError(
        f"{len(wrong)} of {count} timestep buckets of the engines in {folder} do not give their golden "
        f"outputs; bucket {worst['bucket']}: relative L2 {worst['rel_l2']:.1e}, "
        f"{worst['non_finite']} values NaN or infinite, allowed {worst['tolerance']:.0e}. They stay "
        "unusable. Build with --mode per_bucket if this was the mode profiles (known wrong results of "
        "TensorRT 10.3 with open lengths), else with a newer JetPack; diffcr validate --level engine "
        "--bisect names the first block that is off.",
        code="DCR-Q002",
    )
