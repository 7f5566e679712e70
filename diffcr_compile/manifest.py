"""The artifact's manifest: what was built, and the hash of every file a load depends on.

Standard library only: this file goes on the device with the runtime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffcr_compile.durable import PARTIAL_SUFFIX, atomic_write_bytes
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest_form import wrong_form

SCHEMA_VERSION = 4
MANIFEST_FILE = "manifest.json"
# What a load depends on. calibration/, report/, engines/ and baseline/ may change freely.
CHECKED_FOLDERS = ("onnx", "golden", "model")
# A manifest of 64 buckets and 1,000 blocks has about 2 MB.
MAX_MANIFEST_BYTES = 1 << 24
_CHECKSUM = "checksum"
_CHUNK = 1 << 20
# What changes when a file is replaced or written to: device, number, bytes, times of content and of status.
Stamp = tuple[int, int, int, int, int]
_AGAIN = "Copy the artifact again, or make it anew with diffcr compile."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known about an artifact. Everything in it is JSON.

    Attributes:
        created: ISO date and time, UTC.
        model: name, revision (or None) and number of parameters.
        versions: package or format -> version that made the artifact.
        inputs: name, dtype (as numpy names it) and shape of every input, in graph order.
        outputs: the same of every output.
        timestep_input: which input is the timestep; None if it is not known.
        sample_input: which input is the noisy sample; None if it is not known.
        buckets: index, low, high, weight, onnx and golden (relative paths) of every timestep
            bucket; a bucket takes timesteps in (low, high].
        weights: relative path of the weights that all graphs share.
        schedule: block -> kept tokens per bucket.
        num_tokens: block -> image tokens present.
        budget: metric, asked and reached, shares of the dense model.
        parity: tolerance, and one row per bucket in `buckets`.
        files: relative path -> sha256 and bytes of every file in onnx/, golden/ and model/.
        stages: stage -> status.
        constants: argument -> what it is in the graphs, for every argument that is no input; see
            ``runtime/constants.py``.
        profile_graphs: graphs that serve several timestep buckets, for engines with one profile per
            bucket: onnx (relative path), buckets, kept_inputs (input -> block whose kept tokens are its
            length) and remark (why it serves no more buckets, or ""). Together they serve every bucket;
            none if they were not exported.
        precision: type of the matrix products in the graphs, ``fp32``, ``fp16``, ``bf16`` or ``int8`` (linear
            layers of tokens; the others fp16); of all but the first also which blocks are float32 islands,
            and the ranges that say why.
        schema_version: of this structure.
    """

    created: str
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    timestep_input: str | None
    sample_input: str | None
    buckets: Sequence[Mapping[str, Any]]
    weights: str
    schedule: Mapping[str, Sequence[int]]
    num_tokens: Mapping[str, int]
    budget: Mapping[str, Any]
    parity: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    stages: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profile_graphs: Sequence[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    precision: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "fp32"})
    schema_version: int = SCHEMA_VERSION

    @property
    def runs_on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU has kernels for what the graphs compute in; for bfloat16 it has none."""
        return bool(self.precision["type"] != "bf16")


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> sha256 and bytes of every file that a manifest must list."""
    return {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in sorted(_files_below(folder))
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; an artifact exists from this moment on."""
    atomic_write_bytes(folder / MANIFEST_FILE, manifest_text(manifest).encode())


def manifest_text(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    # As JSON has it: tuples are lists there, and the checksum is over what will be read.
    return _written(json.loads(json.dumps(dataclasses.asdict(manifest), allow_nan=False)))


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``; see :func:`verify_artifact` for the files.

    Raises:
        ArtifactError: there is none, it is damaged, or it has another schema version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no {MANIFEST_FILE}, so it is no finished artifact. Name a folder "
            "that diffcr compile made, or run that again: it goes on where it stopped.",
            code="DCR-A001",
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link to {path.resolve()}, out of the artifact. Put the file itself there.",
            code="DCR-A006",
        )
    try:
        text = _read_limited(path)
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. {_AGAIN}", code="DCR-A002"
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {str(version)[:40]!r}, this diffcr_compile reads version "
            f"{SCHEMA_VERSION}. Install the version that made it, or make the artifact anew.",
            code="DCR-A003",
        )
    checksum = data.pop(_CHECKSUM, None)
    expected = {field.name for field in dataclasses.fields(Manifest)}
    if set(data) != expected:
        missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
        raise ArtifactError(
            f"{path} is damaged: missing keys {missing}, unknown keys {unknown}. {_AGAIN}",
            code="DCR-A002",
        )
    manifest = Manifest(**data)
    wrong = wrong_form(manifest)
    if wrong is not None:
        raise ArtifactError(f"{path}: {wrong}. {_AGAIN}", code="DCR-A002")
    if checksum != _checksum(data) or text != _written(data):
        raise ArtifactError(
            f"{path} was changed after it was written: its checksum does not fit. {_AGAIN}",
            code="DCR-A002",
        )
    return manifest


def _read_limited(path: Path) -> str:
    """The text of a file of a bearable size."""
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_MANIFEST_BYTES}")
    return path.read_bytes().decode("utf-8")


def _checksum(data: Mapping[str, Any]) -> str:
    """Over what the manifest says; the files have hashes of their own in it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _written(data: Mapping[str, Any]) -> str:
    """The text of ``manifest.json``, checksum last."""
    whole = {**data, _CHECKSUM: _checksum(data)}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def verify_artifact(
    folder: Path, manifest: Manifest, only: Collection[str] | None = None
) -> dict[str, Stamp]:
    """Raise unless every file is there and is the one that was written.

    Args:
        folder: the artifact.
        manifest: its manifest.
        only: folders to look at, some of onnx, golden and model; None for all of them.

    Returns:
        Relative path -> how the file looked when its hash was right, for :func:`check_file_again`.

    Raises:
        ArtifactError: a file is missing, truncated, changed, not listed, or out of the folder.
    """
    checked = tuple(CHECKED_FOLDERS if only is None else only)
    listed = {name for name in manifest.files if _top(folder, name) in checked}
    _check_references(folder, manifest)
    extra = sorted(set(_files_below(folder, checked)) - listed)
    if extra:
        raise ArtifactError(
            f"{folder} has an extra file {extra[0]!r} ({len(extra)} in all) that its manifest "
            f"does not list. Delete it, or make the artifact anew with diffcr compile.",
            code="DCR-A005",
        )
    return {name: _check_file(folder, name, manifest.files[name]) for name in sorted(listed)}


def check_file_again(folder: Path, manifest: Manifest, name: str, seen: Stamp) -> Stamp:
    """Raise unless a file is still the one that was written; hashed only where it looks otherwise.

    Args:
        folder: the artifact.
        manifest: its manifest.
        name: relative path, as the manifest lists it.
        seen: how it looked when its hash was right.

    Returns:
        How it looks now.

    Raises:
        ArtifactError: it is gone or has another hash.
    """
    path = folder / name
    if path.is_file() and _stamp(path) == seen:
        return seen
    return _check_file(folder, name, manifest.files[name])


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return (
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> Stamp:
    path = folder / name
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing, but the manifest lists it. {_AGAIN}", code="DCR-A004"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link to {path.resolve()}, out of the artifact. Put the file itself there.",
            code="DCR-A006",
        )
    stamp = _stamp(path)  # before it is read: a change in between shows later
    found = path.stat().st_size
    if found != entry["bytes"]:
        raise ArtifactError(
            f"{path} has {found} bytes, the manifest says {entry['bytes']}: truncated or "
            f"replaced. {_AGAIN}",
            code="DCR-A004",
        )
    digest = sha256_file(path)
    if digest != entry["sha256"]:
        raise ArtifactError(
            f"{path} was changed: its sha256 is {digest[:12]}…, the manifest says "
            f"{entry['sha256'][:12]}…. {_AGAIN}",
            code="DCR-A004",
        )
    return stamp


def _check_references(folder: Path, manifest: Manifest) -> None:
    """The files that a load opens must be among those whose hashes are checked."""
    used = [bucket[key] for bucket in manifest.buckets for key in ("onnx", "golden")]
    used += [row["onnx"] for row in manifest.profile_graphs]
    for name in (*used, manifest.weights):
        if name not in manifest.files:
            raise ArtifactError(
                f"{folder / MANIFEST_FILE} uses {name!r} but has no hash of it. {_AGAIN}",
                code="DCR-A002",
            )


def _top(folder: Path, name: str) -> str:
    """First folder of a relative path, after refusing paths that could lead out."""
    parts = PurePosixPath(name).parts
    leads_out = name.startswith("/") or PureWindowsPath(name).drive or "\\" in name
    is_inside = len(parts) > 1 and parts[0] in CHECKED_FOLDERS and ".." not in parts
    # a line break in a name would end the list of hashes in build_on_device.sh and begin a command
    if leads_out or not is_inside or not name.isprintable():
        raise ArtifactError(
            f"{folder / MANIFEST_FILE} lists {name!r}, which is not a plain path inside the "
            f"artifact's folders {', '.join(CHECKED_FOLDERS)}. Do not use this artifact.",
            code="DCR-A006",
        )
    return parts[0]


def _files_below(folder: Path, tops: Collection[str] = CHECKED_FOLDERS) -> Iterator[str]:
    """Relative paths, with forward slashes, of files and of links to folders."""
    for top in tops:
        for parent, folders, names in os.walk(folder / top):
            linked = [name for name in folders if (Path(parent) / name).is_symlink()]
            for name in (*names, *linked):
                if not name.endswith(PARTIAL_SUFFIX):
                    yield (Path(parent) / name).relative_to(folder).as_posix()
