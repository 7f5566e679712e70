"""Engines on disk: ``engines/<device>_<sm>_trt<version>/`` with plans, a sidecar and ``engine.ok.json``.

An engine runs on the kind of device and with the TensorRT that it was built with, and nowhere else.
TensorRT itself notices some of that; wrong results of a known kind it does not (docs/jetson.md). So the
sidecar says what an engine is for, and ``engine.ok.json`` is written only after every profile gave the
golden outputs; both are read here, before a plan is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.durable import force_folder, write_json_atomic
from diffcr_compile.engine_plan import EnginePlan
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import Manifest, sha256_file
from diffcr_compile.runtime.device import MODULES, Device

ENGINES = "engines"
SIDECAR = "engine.json"
OK_FILE = "engine.ok.json"
# 3: also which board, and how much memory; an older sidecar does not say where its engines may run
SIDECAR_VERSION = 3
MAX_SIDECAR_BYTES = 1 << 24
_OTHER_BYTES = "was changed: its sha256 is not the one in its sidecar"


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """The file of one engine.

    Attributes:
        sha256: of its bytes.
        bytes: its size.
    """

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What is known about the engines of a folder.

    Attributes:
        device: what they were built on or, ahead of time, for.
        made_from: :func:`made_from` of the artifact.
        plan: which engines there are, with their profiles.
        files: name of an engine -> its file, which is called :func:`plan_file`.
        settings: of the build.
        ahead_of_time: whether no such device was there when they were built.
        created: ISO date and time, UTC.
        sha256: of the file that all this was read from; "" if it was not read.
    """

    device: Device
    made_from: str
    plan: EnginePlan
    files: Mapping[str, PlanFile]
    settings: Mapping[str, Any]
    ahead_of_time: bool
    created: str
    sha256: str = ""

    def __post_init__(self) -> None:
        names = sorted(engine.name for engine in self.plan.engines)
        if names != sorted(self.files):
            raise ValueError(f"it has files of {sorted(self.files)} for the engines {names}")

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "sidecar_version": SIDECAR_VERSION,
            "device": dataclasses.asdict(self.device),
            "made_from": self.made_from,
            "plan": self.plan.to_json(),
            "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
            "settings": dict(self.settings),
            "ahead_of_time": self.ahead_of_time,
            "created": self.created,
        }


def plan_file(engine: str) -> str:
    """Name of the file of an engine."""
    return f"{engine}.plan"


def read_plan_file(path: Path) -> PlanFile:
    """Hash and size of a plan that was just built."""
    return PlanFile(sha256=sha256_file(path), bytes=path.stat().st_size)


def graphs_hash(manifest: Manifest) -> str:
    """One hash of all graphs and their weights, as the manifest lists them: what a plan depends on."""
    return files_hash(manifest, "onnx/")


def files_hash(manifest: Manifest, start: str) -> str:
    """One hash of all files whose names begin so, as the manifest lists them."""
    return _hash(
        sorted(
            (name, entry["sha256"])
            for name, entry in manifest.files.items()
            if name.startswith(start)
        )
    )


def made_from(manifest: Manifest) -> str:
    """One hash of all that engines of an artifact must agree with: which graph a timestep bucket runs, too.

    The same graphs under another schedule give other engines to a bucket, though no file differs.
    """
    buckets = [
        [row[key] for key in ("index", "low", "high", "onnx")] for row in manifest.buckets
    ]
    shared = [
        [row[key] for key in ("onnx", "buckets", "kept_inputs")]
        for row in manifest.profile_graphs
    ]
    tensors = [
        [[row[key] for key in ("name", "dtype", "shape")] for row in rows]
        for rows in (manifest.inputs, manifest.outputs)
    ]
    calls = [manifest.schedule, manifest.timestep_input]
    return _hash([graphs_hash(manifest), buckets, shared, tensors, calls])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def take_ok_back(folder: Path) -> None:
    """Nothing in the folder may be used from here on, also if this process or the power ends next."""
    if (folder / OK_FILE).is_file():
        (folder / OK_FILE).unlink()
        force_folder(folder)


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write ``engine.json``; what was said about earlier engines there no longer holds."""
    take_ok_back(folder)
    write_json_atomic(folder / SIDECAR, sidecar.to_json())


def write_ok(
    folder: Path, sidecar: Sidecar, rows: Sequence[Mapping[str, Any]], checked: str
) -> None:
    """Write ``engine.ok.json``: every profile gave the golden outputs.

    Args:
        folder: of the engines.
        sidecar: of the engines that gave them, as it was read before.
        rows: one per timestep bucket, with its figures.
        checked: ISO date and time, UTC.

    Raises:
        ArtifactError: another sidecar lies there by now.
    """
    if _read_json(folder / SIDECAR)[1] != sidecar.sha256:
        raise ArtifactError(
            f"{folder / SIDECAR} was changed while its engines were compared with the golden outputs: what lies "
            "there now is unchecked. Let builds end first, then run the check again.",
            code="DCR-A011",
        )
    content = {"sidecar_sha256": sidecar.sha256, "checked": checked}
    write_json_atomic(folder / OK_FILE, {**content, "buckets": [dict(r) for r in rows]})


def read_sidecar(folder: Path) -> Sidecar:
    """The sidecar of a folder of engines.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    data, digest = _read_json(folder / SIDECAR)
    if data.get("sidecar_version") != SIDECAR_VERSION:
        found = str(data.get("sidecar_version"))[:40]
        raise _damaged(
            folder, f"its version is {found!r}, this runtime reads {SIDECAR_VERSION}"
        )
    try:
        return Sidecar(
            device=_device(data["device"]),
            made_from=str(data["made_from"]),
            plan=EnginePlan.from_json(data["plan"]),
            files={str(name): _plan_file(row) for name, row in data["files"].items()},
            settings=dict(data["settings"]),
            ahead_of_time=bool(data["ahead_of_time"]),
            created=str(data["created"]),
            sha256=digest,
        )
    except ArtifactError as error:
        raise _damaged(folder, error.message) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def is_checked(folder: Path, sidecar: Sidecar) -> bool:
    """Whether ``engine.ok.json`` is there and is about the sidecar that was read."""
    if not (folder / OK_FILE).is_file():
        return False
    return bool(_read_json(folder / OK_FILE)[0].get("sidecar_sha256") == sidecar.sha256)


def check_plans(folder: Path, sidecar: Sidecar, contents: bool = True) -> None:
    """Raise ArtifactError unless every plan is the one that the sidecar describes; without `contents`, as far as its size says."""
    for engine, file in sidecar.files.items():
        path = folder / plan_file(engine)
        if not path.is_file():
            raise _wrong_plan(path, "is missing")
        _check_plan(path, path.stat().st_size, file)
        if contents and sha256_file(path) != file.sha256:
            raise _wrong_plan(path, _OTHER_BYTES)


def read_plan(folder: Path, sidecar: Sidecar, engine: str, verify: bool = True) -> bytes:
    """The bytes of a plan, compared with the sidecar after they were read: nothing can come between.

    Args:
        folder: of the engines.
        sidecar: of them.
        engine: its name.
        verify: compare the hash too, not the size alone.

    Raises:
        ArtifactError: the plan is missing or is not the one that the sidecar describes.
    """
    path, file = folder / plan_file(engine), sidecar.files[engine]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _wrong_plan(path, "is missing") from None
    except OSError as error:
        raise _wrong_plan(path, f"cannot be read: {error.strerror or error}") from error
    _check_plan(path, len(data), file)
    if verify and hashlib.sha256(data).hexdigest() != file.sha256:
        raise _wrong_plan(path, _OTHER_BYTES)
    return data


def _check_plan(path: Path, size: int, file: PlanFile) -> None:
    """Raise ArtifactError unless a plan has the size that its sidecar says."""
    if size != file.bytes:
        raise _wrong_plan(
            path, f"has {size} bytes, its sidecar says {file.bytes}: truncated or replaced"
        )


def _wrong_plan(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{path} {problem}. {rebuild(path.parent.parent.parent)}", code="DCR-A011"
    )


def rebuild(artifact: Path) -> str:
    """What to do about an engine that cannot be used."""
    return (
        f"Build it again on this device: diffcr build {artifact}, or, with trtexec and without the "
        f"compiler: sh build_on_device.sh in {artifact}, then python3 diffcr_runtime.pyz check."
    )


def _device(data: Mapping[str, Any]) -> Device:
    device = Device(
        name=str(data["name"]),
        sm=_whole(data["sm"]),
        runtime=str(data["runtime"]),
        version=str(data["version"]),
        board=str(data["board"]),
        memory_gb=_whole(data["memory_gb"]),
    )
    if device.runtime not in MODULES:
        raise ValueError(f"the runtime is {device.runtime[:40]!r}")
    return device


def _plan_file(row: Mapping[str, Any]) -> PlanFile:
    return PlanFile(sha256=str(row["sha256"]), bytes=_whole(row["bytes"]))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, found {str(value)[:40]!r}")
    return value


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """What a file holds, and the hash of the bytes that say so."""
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        whole = path.read_bytes()
        data = json.loads(whole.decode("utf-8"))
        if not isinstance(data, dict):
            raise TypeError(f"it holds {type(data).__name__}, expected an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error
    return data, hashlib.sha256(whole).hexdigest()


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"the sidecar of the engines in {folder} cannot be read: {why}. {rebuild(folder.parent.parent)}",
        code="DCR-A011",
    )
