"""The zip for a device: complete, without torch, and it runs in an empty folder."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffcr_compile import cli, on_device
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest, hash_files, read_manifest, write_manifest
from diffcr_compile.pack import pack, runtime_sources
from diffcr_compile.planning.targets import find_target
from diffcr_compile.runtime import open_engines
from tests import device_artifact as small

FAKES = Path(__file__).parent / "fakes"
# What a board does not have. onnx and safetensors are blocked too: the runtime needs neither.
BLOCKED = (
    "torch", "onnx", "onnxscript", "onnx_ir", "diffusers", "pydantic", "safetensors", "rich", "typer", "yaml",
)  # fmt: skip
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is not on this device")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights for torch, which a device does not need."""
    out = small.write(tmp_path_factory.mktemp("artifact") / "out")
    (out / "model/routed.safetensors").write_bytes(b"weights for torch")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["files"] = hash_files(out)
    write_manifest(out, Manifest(**manifest))
    return out


@pytest.fixture(scope="module")
def zipped(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(artifact, tmp_path_factory.mktemp("zip") / "model.zip").path


@pytest.fixture
def device(zipped: Path, tmp_path: Path) -> Path:
    """An empty folder into which the zip was unpacked; nothing of the checkout is in it."""
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "device")
    return tmp_path / "device"


def python(folder: Path, *arguments: str, path: str = "", **more: str) -> Any:
    paths = [str(folder / "diffcr_runtime.pyz"), *([path] if path else [])]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), **more}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def test_one_step_runs_with_onnxruntime_where_torch_cannot_be_imported(device: Path) -> None:
    inputs = small.call(600.0)
    np.savez(device / "inputs.npz", **inputs)
    code = f"""{BLOCKER}
import numpy as np
import diffcr_compile
from diffcr_compile import runtime

assert ".pyz" in diffcr_compile.__file__, diffcr_compile.__file__
runner = runtime.load(".", threads=1)
np.save("output.npy", runner(**np.load("inputs.npz")))
assert not set({BLOCKED}) & set(sys.modules)
"""
    done = python(device, "-c", code)
    assert done.returncode == 0, done.stderr
    found = np.load(device / "output.npy")
    np.testing.assert_allclose(found, small.expected(inputs, 2), atol=1e-5)


def test_every_module_of_the_runtime_imports_where_torch_cannot_be(device: Path) -> None:
    names = [
        "diffcr_compile." + name.removesuffix(".py").replace("/", ".")
        for name, _ in runtime_sources()
        if name.endswith(".py") and not name.endswith("__init__.py")
    ]
    assert len(names) > 30
    code = f"{BLOCKER}\nimport importlib\nfor name in {names}: importlib.import_module(name)"
    done = python(device, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_runtime_is_python_3_10() -> None:
    """JetPack 6 has Python 3.10. Names that later versions brought are looked for in what is imported."""
    later = {
        "typing": {"Self", "assert_never", "override", "Never", "LiteralString", "Unpack"},
        "enum": {"StrEnum"},
        "datetime": {"UTC"},
        "contextlib": {"chdir"},
        "itertools": {"batched"},
    }
    for name, path in runtime_sources():
        if not name.endswith(".py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), name, feature_version=(3, 10))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert "tomllib" not in {alias.name for alias in node.names}, name
            if isinstance(node, ast.ImportFrom):
                used = {alias.name for alias in node.names}
                assert not used & later.get(node.module or "", set()), name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in later.get(node.value.id, set()), name
            assert not isinstance(node, getattr(ast, "TryStar", ())), name


def test_the_verbs_of_the_device_validate_examine_build_and_check(device: Path) -> None:
    pyz = "diffcr_runtime.pyz"
    blocker = device / "sitecustomize"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        BLOCKER.replace("'onnx', ", "")
    )  # the stand-in reads it
    paths = os.pathsep.join([str(blocker), str(FAKES)])
    done = python(device, pyz, "validate", path=paths)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative L2") == 2 * len(
        small.KEPT
    )  # static graphs, and the open one
    done = python(device, pyz, "doctor", ".", "--json", path=paths)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["tensorrt"]["found"] == "10.3.0"
    done = python(device, pyz, "doctor", "nosuch", path=paths)
    assert done.returncode == 7
    assert "DCR-A001" in done.stderr
    done = python(device, pyz, "check", path=paths)
    assert done.returncode == 7
    assert "has no engines for Orin (8 GB), SM87" in done.stderr
    done = python(device, pyz, "build", "--mode", "profiles", path=paths)
    assert done.returncode == 0, done.stderr
    assert "the engines may be used" in done.stdout
    done = python(device, pyz, "check", path=paths)
    assert done.returncode == 0, done.stderr


def test_what_the_script_built_is_checked_and_then_runs(device: Path, zipped: Path) -> None:
    """trtexec is a stand-in that builds with the stand-in of TensorRT."""
    (device / "bin").mkdir()
    trtexec = device / "bin/trtexec"
    trtexec.write_text(
        f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(FAKES)!r})
import tensorrt as trt
if sys.argv[1] == "--help":
    sys.exit(print("--stronglyTyped"))
given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
network = trt.Builder(None).create_network(2)
assert trt.OnnxParser(network, None).parse_from_file(given["--onnx"])
plan = trt.Builder(None).build_serialized_network(network, trt._Config())
open(given["--saveEngine"], "wb").write(plan)
"""
    )
    trtexec.chmod(0o755)
    assert os.access(device / "build_on_device.sh", os.R_OK)

    def script() -> Any:
        return subprocess.run(
            ["sh", "build_on_device.sh"],
            cwd=device,
            env={"PATH": f"{device / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    done = script()
    assert done.returncode == 0, done.stderr
    code = "from diffcr_compile import runtime; runtime.load('.', backend='tensorrt')"
    before = python(device, "-c", code, path=str(FAKES))
    assert "has no engines for Orin" in before.stderr
    checked = python(device, "diffcr_runtime.pyz", "check", path=str(FAKES))
    assert checked.returncode == 0, checked.stderr
    assert python(device, "-c", code, path=str(FAKES)).returncode == 0
    assert [p.name for p in (device / "engines").iterdir() if "sm87" in p.name] == [
        "orin_sm87_trt10.3.0"
    ]
    assert script().stdout.count("built already") == 3


def test_a_device_gets_all_but_the_weights_for_torch_and_the_rest_is_bit_equal(
    artifact: Path, device: Path, zipped: Path
) -> None:
    packed = pack(artifact, zipped.with_name("again.zip"))
    assert packed.left_out == ("model/routed.safetensors",)
    assert packed.path.read_bytes() == zipped.read_bytes()
    for name in read_manifest(device).files:
        assert (device / name).read_bytes() == (artifact / name).read_bytes()
    names = {
        path.relative_to(device).as_posix() for path in device.rglob("*") if path.is_file()
    }
    extra = {
        "manifest.json",
        "build_on_device.sh",
        "device.json",
        "README.txt",
        "diffcr_runtime.pyz",
    }
    assert names == set(read_manifest(device).files) | extra
    with zipfile.ZipFile(zipped) as archive:
        assert archive.getinfo("build_on_device.sh").external_attr >> 16 & 0o111


def test_a_target_chooses_the_mode_of_the_script(artifact: Path, tmp_path: Path) -> None:
    old = pack(artifact, tmp_path / "a.zip", find_target("jetson-agx-orin@jp6.2"))
    new = pack(artifact, tmp_path / "b.zip", find_target("jetson-agx-orin@jp7.2"))
    assert (old.mode, new.mode) == ("per_bucket", "profiles")  # 10.3 has known wrong results
    with zipfile.ZipFile(new.path) as archive:
        assert "mode=${1:-profiles}" in archive.read("build_on_device.sh").decode()


def test_what_cannot_be_packed_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.zip"):
        pack(artifact, tmp_path / "model.tar")
    for no_name in (Path("."), Path(".."), Path("/")):
        with pytest.raises(UsageError, match=r"the package is a zip.*such as \S*\.zip"):
            pack(artifact, no_name)
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "onnx/weights.bin").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="weights"):
        pack(copy, tmp_path / "model.zip")
    assert list(tmp_path.glob("*.zip*")) == []


def test_the_verb_says_where_the_zip_is(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["pack", str(artifact), "-o", str(tmp_path / "x.zip"), "--json"]
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == (tmp_path / "x.zip").stat().st_size
    assert "diffcr_runtime.pyz" in found["files"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\xff", '{"mode": "fastest"}', '{"mode": ["profiles"]}', '{"layout": 1}', "[" * 9999]
)  # fmt: skip
def test_a_damaged_file_about_the_target_is_said_in_words(
    text: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "device.json").write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(open_engines, "open_device", lambda: (None, None, "a device"))
    assert on_device.main(["build", str(copy)]) == 7
    said = capsys.readouterr().err
    assert "ArtifactError DCR-A000" in said
    assert "device.json is damaged" in said
    assert "diffcr pack" in said


def test_what_the_disk_answers_on_a_device_is_said_in_words(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "engine.plan")

    monkeypatch.setattr(on_device, "verify_artifact", full)
    assert on_device.main(["validate", str(artifact)]) == 5
    said = capsys.readouterr().err
    assert "ResourceError DCR-R001: engine.plan cannot be read or written" in said
