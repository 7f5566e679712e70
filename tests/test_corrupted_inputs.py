"""Fuzzing of everything that is read from disk: only documented errors come out, never another exception.

Files of an artifact that a load reads are damaged by the hundred in ``benchmarks/reliability/corruption.py``; here it
is the readers themselves, with values that no damage by chance would give.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from diffcr_compile.calibrate.state import load_state
from diffcr_compile.config_file import load_config
from diffcr_compile.config_text import read_effective
from diffcr_compile.error_cases import CASES
from diffcr_compile.errors import DiffCRError
from diffcr_compile.export.block_values import BLOCK_VALUES, read_block_values
from diffcr_compile.export.device.memory import ACTIVATIONS, read_activations
from diffcr_compile.export.golden import read_golden
from diffcr_compile.latency_table import read_latency_table
from diffcr_compile.manifest import (
    MANIFEST_FILE,
    hash_files,
    read_manifest,
    verify_artifact,
    write_manifest,
)
from diffcr_compile.planning.targets import find_target, read_targets
from diffcr_compile.recipe import RECIPE_FILE, read_recipe
from diffcr_compile.runtime.block_bench import open_kit
from diffcr_compile.runtime.engine_files import read_sidecar
from diffcr_compile.runtime.polygraphy_json import read_inputs, read_outputs
from diffcr_compile.schedule import TokenSchedule
from diffcr_compile.sources import load_case
from diffcr_compile.workspace import STAGES_FILE, Workspace
from tests import device_artifact

MANY = settings(
    max_examples=int(os.environ.get("DIFFCR_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
)
NAMES = st.sampled_from(
    ["a", "onnx", "index", "low", "sha256", "bytes", "calibration", "steps", "name", "shape", "path", "dtype"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
GARBAGE = (
    b"", b"\0", b"\xff\xfe\xfd", b"{", b"[" * 5000, b'{"a":' * 3000, b"null", b"9" * 5000, b"NaN", b"- " * 3000,
    b"&a [*a]", b"\xef\xbb\xbf{}", b"key: [1, 2", b"? {a: 1}\n: 2", b"1: 2", b"!!int x", b"2026-13-45", b"<<: 3",
)  # fmt: skip


def documented(read: Callable[[], Any]) -> None:
    """Run a reader; it may succeed, or say a documented error."""
    said = None
    try:
        read()
    except DiffCRError as error:
        said = error
    if said is not None:
        assert said.code in CASES
        assert said.exit_code != 1, said


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree of JSON."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """A tree of JSON with one to three places changed, removed or added to."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        inside = [place for place in places(tree) if place]
        if not inside:
            return draw(VALUES)
        *parents, last = draw(st.sampled_from(inside))
        node = tree
        for key in parents:
            node = node[key]
        action = draw(st.sampled_from(["change", "remove", "add"]))
        if action == "remove" and isinstance(node, (dict, list)) and len(node):
            del node[last]
        elif action == "add" and isinstance(node, dict):
            node[draw(NAMES)] = draw(VALUES)
        else:
            node[last] = draw(VALUES)
    return tree


def rehashed(artifact: Path) -> None:
    """Make the hashes fit what the files are now, as somebody who may rewrite the artifact would."""
    manifest = read_manifest(artifact)
    write_manifest(artifact, dataclasses.replace(manifest, files=hash_files(artifact)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_artifact.write(tmp_path_factory.mktemp("fuzz") / "artifact")


# ---------------------------------------------------------------- the manifest


@MANY
@given(data=st.data())
def test_a_manifest_with_other_values_is_refused_in_words(
    artifact: Path, data: st.DataObject
) -> None:
    whole = json.loads((artifact / MANIFEST_FILE).read_text())
    tree = data.draw(changed({k: v for k, v in whole.items() if k != "checksum"}))
    folder = artifact.parent / "manifest"
    folder.mkdir(exist_ok=True)
    from diffcr_compile.manifest import _written

    try:
        text = _written(tree)  # its checksum fits
    except ValueError:
        text = json.dumps(tree)  # NaN: as somebody else's writer would put it
    (folder / MANIFEST_FILE).write_text(text)

    def read() -> None:
        verify_artifact(folder, read_manifest(folder))

    documented(read)


# ---------------------------------------------------------------- JSON files


def _schedule(path: Path) -> Any:
    return TokenSchedule.from_json(json.loads(path.read_text()))


SCHEDULE = {
    "kept_tokens": {"a": [4, 8]}, "num_tokens": {"a": 8}, "edges": [0, 500.0, 1000], "weights": [0.5, 0.5],
    "asked": 0.5, "reached": 0.4, "metric": "macs",
}  # fmt: skip
RECIPE = {
    "model_class": "diffusers.X", "inputs": {"x": ["hidden_states", 0]}, "constants": [{"path": [1], "value": 3}],
    "routing": {"buckets": 2}, "learned": "model/learned.safetensors", "config": {}, "output": None,
    "dtype": "float32", "guidance": None, "schema_version": 1,
}  # fmt: skip
DEVICE = {"name": "GPU", "compute_capability": [8, 7], "memory_bytes": 1 << 33, "runtime": "tensorrt", "version": "10.3",
          "platform": "linux-aarch64"}  # fmt: skip
SIDECAR = {
    "device": DEVICE, "made_from": "0" * 64, "plan": {"mode": "per_bucket", "engines": []}, "files": {},
    "settings": {}, "ahead_of_time": False, "created": "2026-01-01", "schema_version": 1,
}  # fmt: skip
JSON_READERS: dict[str, tuple[str, Any, Callable[[Path], Any]]] = {
    "recipe": (RECIPE_FILE, RECIPE, lambda path: read_recipe(path.parent.parent)),
    "block values": (BLOCK_VALUES, {"a": [{"block": "b"}]}, lambda path: read_block_values(path.parent.parent)),
    "activations": (ACTIVATIONS, [1, 2], lambda path: read_activations(path.parent.parent)),
    "sidecar": ("engines/x/engines.json", SIDECAR, lambda path: read_sidecar(path.parent)),
    "stages": (STAGES_FILE, {"capture": {"key": "k", "seconds": 1.0, "peak_rss_bytes": 5}}, lambda path: stages(path)),
    "polygraphy inputs": ("in.json", [{"x": {"array": "", "__polygraphy_encoding__": "ndarray"}}], read_inputs),
    "polygraphy outputs": ("out.json", {"lst": [["runner", [{"outputs": {}}]]]}, read_outputs),
    "latency table": ("table.json", {"schema_version": 1, "checksum": "0", "levels": {}}, read_latency_table),
    "kit": ("kit/kit.json", {"graphs": [{"onnx": "a.onnx", "sha256": "0"}]}, lambda path: open_kit(path.parent)),
}  # fmt: skip


def stages(path: Path) -> None:
    """What a run that goes on asks of an earlier one's record."""
    with Workspace(path.parent) as space:
        space.finished("capture", "k")
        space.seconds()
        space.peak_rss_bytes()


@pytest.mark.parametrize("name", JSON_READERS)
@MANY
@given(data=st.data())
def test_json_files_with_other_values_are_refused_in_words(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    file, whole, read = JSON_READERS[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data.draw(changed(whole) | VALUES)))
    documented(lambda: read(path))


@pytest.mark.parametrize("name", JSON_READERS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_json_files_of_garbage_are_refused_in_words(
    name: str, garbage: bytes, tmp_path: Path
) -> None:
    file, _, read = JSON_READERS[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(garbage)
    documented(lambda: read(path))


@MANY
@given(tree=changed(SCHEDULE) | VALUES)
@example(tree={**SCHEDULE, "edges": [0, float("nan"), 1]})
@example(tree={**SCHEDULE, "kept_tokens": {"a": [1 << 80, 8]}})
def test_a_schedule_with_other_values_is_refused_in_words(tree: Any) -> None:
    documented(lambda: TokenSchedule.from_json(tree))


# ---------------------------------------------------------------- YAML files


def _as_target(path: Path) -> Any:
    read_targets(path)
    return find_target(str(path))


YAML_READERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "settings": ({"calibration": {"steps": 3}, "routing": {"buckets": 2, "include": ["a"]}}, load_config),
    "effective settings": ({"calibration": {"steps": 3}, "run": {"model": "demo"}}, read_effective),
    "target": ({"name": "t", "device": "d", "engine": "tensorrt", "max_topk": 10}, _as_target),
    "calls": ([{"prompt": "a"}], lambda path: load_case(f"diffusers:{path.parent}", None, path)),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML_READERS)
@MANY
@given(data=st.data())
def test_yaml_files_with_other_values_are_refused_in_words(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    whole, read = YAML_READERS[name]
    path = tmp_path / "file.yaml"
    tree = data.draw(changed(whole) | VALUES)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    documented(lambda: read(path))


@pytest.mark.parametrize("name", YAML_READERS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_yaml_files_of_garbage_are_refused_in_words(
    name: str, garbage: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(garbage)
    documented(lambda: YAML_READERS[name][1](path))


@MANY
@given(key=st.text("abc.calibration steps", max_size=24), value=VALUES)
def test_settings_of_the_command_line_are_refused_in_words(key: str, value: Any) -> None:
    documented(lambda: load_config(None, {key: value}))


# ---------------------------------------------------------------- tensors


TENSORS = save(
    {"input.x": np.arange(6, dtype=np.float32), "output.output": np.zeros((2, 2), np.int64)}
)
SAFETENSORS_READERS: dict[str, Callable[[Path], Any]] = {
    "golden": read_golden,
    "state": lambda path: load_state(path.parent, "key"),
    "inputs": lambda path: load_case(f"diffusers:{path.parent}", path),
}


@pytest.mark.parametrize("name", SAFETENSORS_READERS)
@MANY
@given(data=st.data())
def test_damaged_tensors_are_refused_in_words(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "state.safetensors"
    damaged = bytearray(TENSORS)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    documented(lambda: SAFETENSORS_READERS[name](path))


@MANY
@given(
    header=st.dictionaries(
        st.sampled_from(["input.x", "output.output", "__metadata__"]),
        VALUES | st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "BF16", "X"]) | VALUES, "shape": st.lists(st.integers(-2, 1 << 62), max_size=3) | VALUES,
             "data_offsets": st.lists(st.integers(-8, 40), max_size=3) | VALUES}
        ),
        max_size=3,
    )
)  # fmt: skip
def test_headers_that_lie_are_refused_in_words(header: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "golden.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    documented(lambda: read_golden(path))


@pytest.mark.parametrize("name", SAFETENSORS_READERS)
@pytest.mark.parametrize(
    "garbage", [*GARBAGE, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"]
)
def test_tensors_of_garbage_are_refused_in_words(
    name: str, garbage: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(garbage)
    documented(lambda: SAFETENSORS_READERS[name](path))


def test_what_is_said_of_a_file_is_short(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("calibration: {steps: " + "x" * 100_000 + "}")
    with pytest.raises(DiffCRError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 3000
    assert sys.getrecursionlimit() < 10_000  # nobody raised it to get through
