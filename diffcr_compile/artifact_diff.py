"""What differs between two artifacts, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffcr_compile.data_files import read_json, read_yaml
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.runtime.engine_files import files_hash
from diffcr_compile.workspace import EFFECTIVE_FILE

Row = dict[str, Any]
# report.json: what a reader compares first, by the path of keys
_FIGURES = {
    "MACs, share of dense": ("budget", "reached"),
    "speed-up of the sampling loop": ("speedup", "onnxruntime_cpu_loop"),
    "ONNX Runtime against FROZEN, largest difference": ("parity", "onnx_max_abs"),
    "bytes of onnx/": ("size", "onnx_bytes"),
    "quality, compressed": ("quality", "compressed"),
    "quality, dense": ("quality", "dense"),
    "verdict": ("verdict",),
}


def compare_artifacts(a: Path, b: Path) -> dict[str, list[Row]]:
    """Differences by topic; a topic without any has an empty list.

    Raises:
        ArtifactError: one of them is no finished artifact.
    """
    first, second = read_manifest(a), read_manifest(b)
    return {
        "model": _rows(_identity(first), _identity(second)),
        "settings": _rows(_settings(a), _settings(b)),
        "kept tokens": _rows(_kept(first), _kept(second)),
        "figures": _rows(_figures(a), _figures(b)),
        "files": _rows(_contents(first), _contents(second)),
        "versions": _rows(dict(first.versions), dict(second.versions)),
    }


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    rows = []
    for what in {**a, **b}:
        one, two = a.get(what), b.get(what)
        if one == two:
            continue
        numbers = all(isinstance(v, (int, float)) and type(v) is not bool for v in (one, two))
        change = (
            {"change": two - one} if numbers and one is not None and two is not None else {}
        )
        rows.append({"what": what, "a": one, "b": two, **change})
    return rows


def _contents(manifest: Manifest) -> dict[str, Any]:
    """Graphs with their weights, and what they answered to the golden inputs: the same numbers come of the same hashes."""
    return {
        f"sha256 of {start}": files_hash(manifest, start)
        for start in ("onnx/", "golden/bucket")
    }


def _identity(manifest: Manifest) -> dict[str, Any]:
    found = {f"model {key}": value for key, value in manifest.model.items()}
    for spec in (*manifest.inputs, *manifest.outputs):
        found[str(spec["name"])] = f"{spec['dtype']}{list(spec['shape'])}"
    return found


def _kept(manifest: Manifest) -> dict[str, Any]:
    """One row per cell where the timestep buckets are the same; else a row per block."""
    edges = [f"{row['low']:g} to {row['high']:g}" for row in manifest.buckets]
    return {
        f"{block}, t {edge}": kept
        for block, tokens in manifest.schedule.items()
        for edge, kept in zip(edges, tokens, strict=True)
    }


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / EFFECTIVE_FILE
    if not path.exists():
        return {}
    sections = _read(path, read_yaml)
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _figures(folder: Path) -> dict[str, Any]:
    path = folder / "report/report.json"
    if not path.exists():
        return {}
    report = _read(path, read_json)
    return {name: _at(report, keys) for name, keys in _FIGURES.items()}


def _read(path: Path, reader: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        found = reader(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    except ValueError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Make it again with diffcr compile or diffcr report.",
            code="DCR-A002",
        ) from error
    return found


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
