"""What an interrupted run left in a folder: is it whole, is anything torn, what must be the same at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import yaml
from PIL import Image
from safetensors import safe_open

from diffcr_compile.durable import PARTIAL_SUFFIX
from diffcr_compile.errors import ArtifactError
from diffcr_compile.folder_lock import LOCK_FILE
from diffcr_compile.manifest import hash_files, read_manifest, sha256_file, verify_artifact


def result_of(folder: Path) -> dict[str, Any]:
    """What must be the same at the end: every file's hash, the schedule, the budget that was reached.

    Raises:
        ArtifactError: it is no whole artifact.
    """
    manifest = read_manifest(folder)
    verify_artifact(folder, manifest)
    files = {name: entry["sha256"] for name, entry in hash_files(folder).items()}
    return {
        "files": files, "schedule": manifest.schedule, "reached": manifest.budget["reached"],
    }  # fmt: skip


def is_loadable(folder: Path) -> bool:
    """Whether the folder passes what every load checks first; then it is whole."""
    try:
        manifest = read_manifest(folder)
        verify_artifact(folder, manifest)
    except ArtifactError:
        return False
    return True


def torn_files(folder: Path) -> list[str]:
    """Files under their final name that are not whole: there must never be one."""
    found = []
    for name in final_files(folder):
        try:
            _parse(folder / name)
        except Exception as error:  # noqa: BLE001 - whatever a parser says of half a file
            found.append(f"{name}: {type(error).__name__}")
    return found


def final_files(folder: Path) -> list[str]:
    """Relative paths of all files but the lock and unfinished ones."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.name != LOCK_FILE and not any(p.endswith(PARTIAL_SUFFIX) for p in path.parts)
    )


def leftovers(folder: Path) -> list[str]:
    """Unfinished files that nobody will finish."""
    return sorted(path.name for path in folder.rglob(f"*{PARTIAL_SUFFIX}"))


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of every file under its final name."""
    return {name: sha256_file(folder / name) for name in final_files(folder)}


def _parse(path: Path) -> None:
    """Raise unless a file reads to its end as what its name says."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            list(file.keys())
    elif path.suffix == ".onnx":
        onnx.checker.check_model(str(path))  # with the weights beside it
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text())
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")
    elif path.stat().st_size == 0:
        raise ValueError("empty")
