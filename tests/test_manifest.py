"""The manifest: written atomically, read strictly, and no changed file gets past it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcr_compile import manifest as manifest_module
from diffcr_compile.durable import atomic_write_bytes, write_json_atomic
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import (
    MANIFEST_FILE,
    Manifest,
    hash_files,
    read_manifest,
    sha256_file,
    verify_artifact,
    write_manifest,
)

FILES = {
    "onnx/bucket_00.onnx": b"graph",
    "onnx/weights.bin": b"weights" * 100,
    "golden/bucket_00.safetensors": b"golden",
    "model/schedule.json": b"{}",
}


def make_manifest(folder: Path) -> Manifest:
    spec = {"name": "x", "dtype": "float32", "shape": [2, 3]}
    return Manifest(
        created="2026-01-01T00:00:00+00:00",
        model={"name": "toy", "revision": None, "parameters": 1},
        versions={"numpy": "2"},
        inputs=[spec],
        outputs=[spec],
        timestep_input=None,
        sample_input="x",
        buckets=[
            {
                "index": 0,
                "low": 0.0,
                "high": 1000.0,
                "weight": 1.0,
                "onnx": "onnx/bucket_00.onnx",
                "golden": "golden/bucket_00.safetensors",
            }
        ],
        weights="onnx/weights.bin",
        schedule={"blocks.0": [4]},
        num_tokens={"blocks.0": 8},
        budget={"metric": "macs", "asked": 0.6, "reached": 0.59},
        parity={"tolerance": 1e-4, "measure": "max_abs", "buckets": []},
        files=hash_files(folder),
        stages={"export": "done"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole artifact of nonsense files."""
    for name, data in FILES.items():
        atomic_write_bytes(tmp_path / "out" / name, data)
    write_manifest(tmp_path / "out", make_manifest(tmp_path / "out"))
    return tmp_path / "out"


def check(folder: Path) -> None:
    verify_artifact(folder, read_manifest(folder))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    # as an attacker would: the checksum fits what it says now
    text = {name: value for name, value in data.items() if name != "checksum"}
    path.write_text(manifest_module._written(text))


def test_what_was_written_is_read_back(folder: Path) -> None:
    assert read_manifest(folder) == make_manifest(folder)
    check(folder)


def test_an_artifact_may_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    check(tmp_path / "elsewhere")


def test_an_artifact_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    check(tmp_path / "link")


def test_every_file_of_the_checked_folders_is_listed(folder: Path) -> None:
    listed = read_manifest(folder).files
    assert set(listed) == set(FILES)
    assert all(listed[name]["bytes"] == len(data) for name, data in FILES.items())


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} was changed.*manifest says.*anew"):
        check(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(folder: Path, name: str) -> None:
    os.truncate(folder / name, len(FILES[name]) - 1)
    with pytest.raises(ArtifactError, match=rf"{name} has \d+ bytes, the manifest says \d+"):
        check(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        check(folder)


@pytest.mark.parametrize("name", ["onnx/more.onnx", "golden/x/y", "model/pickle.pt"])
def test_an_extra_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"?")
    with pytest.raises(ArtifactError, match=rf"extra file '{name}'.*Delete it"):
        check(folder)


def test_a_linked_folder_is_an_extra_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (folder / "onnx/more").symlink_to(tmp_path / "away")
    with pytest.raises(ArtifactError, match="extra file 'onnx/more'"):
        check(folder)


def test_other_folders_and_unfinished_writes_are_left_alone(folder: Path) -> None:
    for name in (
        "report/a.html",
        "calibration/b",
        "engines/c",
        "baseline/d",
        "onnx/e.partial",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"anything")
    check(folder)


def test_a_link_out_of_the_artifact_is_refused_though_its_bytes_are_right(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "weights.bin"
    (folder / "onnx/weights.bin").rename(target)
    (folder / "onnx/weights.bin").symlink_to(target)
    with pytest.raises(ArtifactError, match=r"is a link to .* out of the artifact"):
        check(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "onnx/../../secret", "/etc/passwd", "C:/x", "onnx\\x", "x", "report/x", ""],
)
def test_a_listed_path_that_could_lead_out_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"s")
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit(folder, lambda data: data["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="not a plain path inside"):
        check(folder)


@pytest.mark.parametrize("key", ["onnx", "golden"])
def test_a_bucket_whose_file_has_no_hash_is_refused(folder: Path, key: str) -> None:
    edit(folder, lambda data: data["buckets"][0].update({key: "onnx/../../other"}))
    with pytest.raises(ArtifactError, match="has no hash of it"):
        check(folder)


@pytest.mark.parametrize("version", [0, 1, "1", None])
def test_another_schema_version_is_refused(folder: Path, version: object) -> None:
    edit(folder, lambda data: data.update(schema_version=version))
    with pytest.raises(ArtifactError, match=r"schema version .*reads version 4"):
        read_manifest(folder)


def test_a_folder_without_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 2}', "\xff"])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        read_manifest(folder)


def test_an_unknown_key_is_refused(folder: Path) -> None:
    edit(folder, lambda data: data.update(surprise=1))
    with pytest.raises(ArtifactError, match=r"unknown keys \['surprise'\]"):
        read_manifest(folder)


@pytest.mark.parametrize("key", ["buckets", "inputs", "outputs", "files"])
@pytest.mark.parametrize("value", [None, [], [{}], {"a": {}}, [1], "x"])
def test_parts_of_another_form_are_refused(folder: Path, key: str, value: object) -> None:
    edit(folder, lambda data: data.update({key: value}))
    with pytest.raises(ArtifactError):
        check(folder)


def two_buckets(data: dict[str, Any], **changes: Any) -> None:
    """Make it an artifact of two timestep buckets, then change the second."""
    first = data["buckets"][0]
    second = {**first, "index": 1, "low": first["high"], "high": 2000.0}
    data.update(buckets=[first, {**second, **changes}], timestep_input="x")
    data["schedule"] = {"blocks.0": [4, 8]}


@pytest.mark.parametrize("changes", [{}, {"low": 1000}], ids=["as written", "whole"])
def test_a_manifest_with_two_buckets_is_read(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, lambda data: two_buckets(data, **changes))
    check(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"low": 900.0}, r"timestep bucket 1 begins at 900\.0, expected 1000\.0"),
        ({"low": 1100.0}, "begins at 1100"),
        ({"low": 0.0, "high": 500.0}, "begins at 0"),
        ({"high": 1000.0}, "goes from 1000"),
        ({"high": None}, "goes from 1000.0 to None"),
        ({"index": 0}, "timestep bucket 1 has the index 0"),
        ({"index": True}, "has the index True"),
        ({"weight": "1"}, "has the weight '1'"),
        ({"weight": -0.5}, "has the weight -0.5"),
    ],
)
def test_buckets_that_do_not_follow_one_another_are_refused(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    edit(folder, lambda data: two_buckets(data, **changes))
    with pytest.raises(ArtifactError, match=words) as caught:
        read_manifest(folder)
    assert caught.value.code == "DCR-A002"


def test_several_buckets_without_a_timestep_to_choose_by_are_refused(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        two_buckets(data)
        data["timestep_input"] = None

    edit(folder, change)
    with pytest.raises(ArtifactError, match="timestep_input is null, but there are 2"):
        read_manifest(folder)


@pytest.mark.parametrize("role", ["timestep_input", "sample_input"])
@pytest.mark.parametrize("value", ["y", "", 3, ["x"], {}])
def test_a_role_that_no_input_has_is_refused(folder: Path, role: str, value: Any) -> None:
    edit(folder, lambda data: data.update({role: value}))
    with pytest.raises(ArtifactError, match=rf"{role} is .*the inputs are \['x'\]"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule", None),
        ("schedule", []),
        ("schedule", {"blocks.0": 4}),
        ("schedule", {"blocks.0": []}),
        ("schedule", {"blocks.0": [4, 4]}),
        ("schedule", {"blocks.0": [4.0]}),
        ("schedule", {"blocks.0": [-1]}),
        ("schedule", {"blocks.0": [9]}),
        ("schedule", {"blocks.1": [4]}),
        ("num_tokens", None),
        ("num_tokens", {"blocks.0": "8"}),
        ("num_tokens", {}),
        ("parity", None),
        ("parity", []),
        ("parity", {}),
        ("parity", {"tolerance": 1e-4}),
        ("parity", {"measure": "max_abs"}),
        ("parity", {"tolerance": "1", "measure": "max_abs"}),
        ("parity", {"tolerance": -1, "measure": "max_abs"}),
        ("parity", {"tolerance": 0.1, "measure": "cosine"}),
        ("parity", {"tolerance": 0.1, "measure": ["max_abs"]}),
    ],
)
def test_schedules_and_gates_of_another_form_are_refused(
    folder: Path, key: str, value: Any
) -> None:
    edit(folder, lambda data: data.update({key: value}))
    with pytest.raises(ArtifactError, match=f"{key.removesuffix('s')}|schedule") as caught:
        read_manifest(folder)
    assert caught.value.code == "DCR-A002"


def test_only_looks_at_the_folders_it_is_told(folder: Path) -> None:
    (folder / "golden/bucket_00.safetensors").write_bytes(b"other")
    manifest = read_manifest(folder)
    verify_artifact(folder, manifest, only=["onnx", "model"])
    with pytest.raises(ArtifactError):
        verify_artifact(folder, manifest, only=["golden"])


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_no_single_changed_byte_passes(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("artifact")
    for file, content in FILES.items():
        atomic_write_bytes(folder / file, content)
    manifest = make_manifest(folder)
    content = bytearray(FILES[name])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError):
        verify_artifact(folder, manifest)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(path, {"new": float("nan")})
    with pytest.raises(TypeError):
        atomic_write_bytes(path, "text")  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_files_are_hashed_in_pieces_as_in_one(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom((1 << 20) + 17)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_a_manifest_cannot_be_changed(folder: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_manifest(folder).weights = "other"  # type: ignore[misc]


def test_the_manifest_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import diffcr_compile.manifest; "
        "print([m for m in ('numpy', 'torch', 'onnx', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_manifest_that_was_changed_is_refused_even_where_nothing_else_would_notice(
    folder: Path,
) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"asked": 0.6', '"asked": 0.7').replace("2026", "2027"))
    assert path.read_text() != text
    with pytest.raises(ArtifactError, match="its checksum does not fit"):
        read_manifest(folder)
    path.write_text(text.rstrip("\n"))
    with pytest.raises(ArtifactError, match="its checksum does not fit"):
        read_manifest(folder)
