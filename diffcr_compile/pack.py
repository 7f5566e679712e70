"""One zip for a device: the artifact and a runtime without torch, ``diffcr_runtime.pyz``."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import diffcr_compile
from diffcr_compile.durable import published
from diffcr_compile.engine_plan import EngineMode, choose_mode
from diffcr_compile.errors import UsageError
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.script import SCRIPT, device_script
from diffcr_compile.manifest import (
    MANIFEST_FILE,
    Manifest,
    manifest_text,
    read_manifest,
    verify_artifact,
)
from diffcr_compile.on_device import DEVICE_FILE
from diffcr_compile.planning.targets import Target

RUNTIME_FILE = "diffcr_runtime.pyz"
README_FILE = "README.txt"
# Weights hardly get smaller, and reading them twice takes long.
_STORED_FROM = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same artifact gives the same bytes
# What the runtime is made of; below these, everything but the exceptions.
_SOURCES = (
    "__init__.py", "callable_package.py", "device_doctor.py", "device_state.py", "durable.py", "engine_plan.py",
    "error_cases.py", "errors.py", "folder_lock.py", "manifest.py", "manifest_form.py", "on_device.py", "progress.py", "validate.py",
    "py.typed",
    "runtime/*.py", "export/__init__.py", "export/golden.py", "export/parity.py", "export/device/*.py",
)  # fmt: skip
_NEEDS_TORCH = frozenset({"diffusers_adapter.py"})
_MAIN = "import sys\n\nfrom diffcr_compile.on_device import main\n\nsys.exit(main())\n"
_README = """\
{name}: a compiled model for {target}

On the device, in this folder (Python 3.10 or newer, numpy; for engines TensorRT and cuda-python):

    python3 {pyz} doctor .        what will not work here, and why
    sh {script}            engines with trtexec ...
    python3 {pyz} check .         ... compared with the golden outputs, then they may be used
    python3 {pyz} build .         both in one, with TensorRT's Python API
    python3 {pyz} validate .      the graphs in ONNX Runtime against the golden outputs

In a program (PYTHONPATH={pyz}):

    from diffcr_compile import runtime
    runner = runtime.load(".", backend="tensorrt")     # or "onnxruntime"
    output = runner({inputs})

Inputs: {signature}
"""


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        path: the zip.
        files: names in it.
        left_out: files of the artifact that a device does not need.
        mode: that ``build_on_device.sh`` builds unless told otherwise.
    """

    path: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    mode: EngineMode


def pack(artifact: Path, path: Path, target: Target | None = None) -> Packed:
    """Write the zip.

    Args:
        artifact: the artifact's folder.
        path: of the zip; overwritten only when the new one is whole.
        target: the device, whose mode is chosen; None for one that is always right, ``per_bucket``.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: nothing is built for the target, or `path` is no name of a zip.
        ResourceError: the zip cannot be written.
    """
    if path.suffix != ".zip":
        has_name = path.name not in ("", "..")
        example = path.with_suffix(".zip") if has_name else path / "model.zip"
        raise UsageError(f"the package is a zip, got {path}; name it so, such as {example}")
    manifest = read_manifest(artifact)
    verify_artifact(artifact, manifest)
    mode = choose_mode(manifest, target).mode if target else "per_bucket"
    layout = target.profile_layout if target else "pinned"
    device = _device_manifest(manifest)
    texts = {
        MANIFEST_FILE: manifest_text(device),
        SCRIPT: device_script(device, mode, BuildSettings(), layout),
        DEVICE_FILE: json.dumps(
            {"target": target.name if target else None, "mode": mode, "layout": layout}
        )
        + "\n",
        README_FILE: _readme(manifest, target),
    }
    with (
        published(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, text in texts.items():
            _add(archive, name, text.encode(), executable=name == SCRIPT)
        _add(archive, RUNTIME_FILE, runtime_archive())
        for name in sorted(device.files):
            _add_file(archive, artifact / name, name)
        names = tuple(archive.namelist())
    left = tuple(sorted(set(manifest.files) - set(device.files)))
    return Packed(path, names, left, mode)


def runtime_archive() -> bytes:
    """``diffcr_runtime.pyz``: runs as ``python3 diffcr_runtime.pyz`` and stands in PYTHONPATH."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "__main__.py", _MAIN.encode())
        for name, path in runtime_sources():
            _add(archive, f"diffcr_compile/{name}", path.read_bytes())
    return data.getvalue()


def runtime_sources() -> Iterator[tuple[str, Path]]:
    """Name below ``diffcr_compile`` and path of every file of the runtime."""
    root = Path(diffcr_compile.__file__).parent
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            if path.name not in _NEEDS_TORCH:
                yield path.relative_to(root).as_posix(), path


def _device_manifest(manifest: Manifest) -> Manifest:
    """The manifest without what only the compiler reads: weights for torch."""
    kept = {
        name: entry
        for name, entry in manifest.files.items()
        if not (name.startswith("model/") and name.endswith(".safetensors"))
    }
    return dataclasses.replace(manifest, files=kept)


def _readme(manifest: Manifest, target: Target | None) -> str:
    return _README.format(
        name=manifest.model["name"],
        target=target.device if target else "a device with TensorRT",
        pyz=RUNTIME_FILE,
        script=SCRIPT,
        inputs=", ".join(f"{spec['name']}=..." for spec in manifest.inputs),
        signature=", ".join(f"{s['name']} {s['dtype']}{s['shape']}" for s in manifest.inputs),
    )


def _add(archive: zipfile.ZipFile, name: str, data: bytes, executable: bool = False) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o755 if executable else 0o644) << 16
    archive.writestr(info, data)


def _add_file(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """A file of the artifact, in pieces: weights may be larger than memory."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    info.file_size = path.stat().st_size
    large = info.file_size >= _STORED_FROM
    info.compress_type = zipfile.ZIP_STORED if large else zipfile.ZIP_DEFLATED
    with path.open("rb") as source, archive.open(info, "w") as entry:
        while piece := source.read(1 << 20):
            entry.write(piece)
