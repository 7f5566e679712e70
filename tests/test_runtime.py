"""The runner: what it refuses, which graph it runs; the sampler: where it ends.

The artifact here is written by hand with onnx.helper: bucket b computes ``x * (b + 1) + t`` and
``x - b``, so a result tells which graph ran.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import (
    ArtifactError,
    EnvironmentMissingError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from diffcr_compile.manifest import Manifest, hash_files, write_manifest
from diffcr_compile.runtime import Runner, backend, euler_flow, load, onnx_backend
from diffcr_compile.runtime.dense import DenseRunner
from diffcr_compile.schedule import TimestepBuckets
from tests import device_artifact

EDGES = (0.0, 250.0, 500.0, 1000.0)
INPUTS = [
    {"name": "x", "dtype": "float32", "shape": [2, 3]},
    {"name": "t", "dtype": "float32", "shape": [2, 1]},
    {"name": "label", "dtype": "int64", "shape": [2]},
]
BUCKETS = len(EDGES) - 1


def toy_graph(bucket: int, two_outputs: bool) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "t"], ["output"]),
        helper.make_node("Sub", ["x", "offset"], ["second"]),
    ]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(i["name"], kinds[i["dtype"]], i["shape"]) for i in INPUTS
    ]
    names = ["output", "second"] if two_outputs else ["output"]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in names]
    constants = [
        numpy_helper.from_array(np.float32(bucket + 1), "factor"),
        numpy_helper.from_array(np.float32(bucket), "offset"),
    ]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


def write_toy(
    folder: Path, two_outputs: bool = False, timestep: str | None = "t", buckets: int = BUCKETS
) -> Path:
    for bucket in range(buckets):
        data = toy_graph(bucket, two_outputs).SerializeToString()
        atomic_write_bytes(folder / f"onnx/bucket_{bucket:02d}.onnx", data)
        atomic_write_bytes(folder / f"golden/bucket_{bucket:02d}.safetensors", b"-")
    atomic_write_bytes(folder / "onnx/weights.bin", b"")
    names = ["output", "second"] if two_outputs else ["output"]
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        model={"name": "toy", "revision": None, "parameters": 0},
        versions={},
        inputs=INPUTS,
        outputs=[{"name": n, "dtype": "float32", "shape": [2, 3]} for n in names],
        timestep_input=timestep,
        sample_input="x",
        buckets=[
            {
                "index": b,
                "low": EDGES[b],
                "high": EDGES[b + 1],
                "weight": 1 / buckets,
                "onnx": f"onnx/bucket_{b:02d}.onnx",
                "golden": f"golden/bucket_{b:02d}.safetensors",
            }
            for b in range(buckets)
        ],
        weights="onnx/weights.bin",
        schedule={},
        num_tokens={},
        budget={"metric": "macs", "asked": None, "reached": None},
        parity={"tolerance": 1e-4, "measure": "max_abs"},
        files=hash_files(folder),
        stages={},
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def runner(toy: Path) -> Runner:
    return load(toy, threads=1)


def call(timestep: float | tuple[float, float] = 100.0, **changes: Any) -> dict[str, Any]:
    times = np.array(timestep, np.float32) * np.ones(2, np.float32)
    arrays: dict[str, Any] = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "t": times[:, None],
        "label": np.zeros(2, np.int64),
    }
    return arrays | changes


@pytest.mark.parametrize(
    ("timestep", "bucket"),
    [
        (-1e9, 0), (0.0, 0), (0.5, 0), (249.99, 0), (250.0, 0), (250.01, 1), (500.0, 1),
        (500.1, 2), (1000.0, 2), (1e9, 2),
    ],
)  # fmt: skip
def test_the_bucket_is_chosen_by_value_and_its_graph_runs(
    runner: Runner, timestep: float, bucket: int
) -> None:
    inputs = call(timestep)
    assert runner.bucket_of(timestep) == bucket
    np.testing.assert_array_equal(
        runner(**inputs), inputs["x"] * (bucket + 1) + np.float32(timestep)
    )


@given(timestep=st.floats(allow_nan=False, allow_infinity=False))
def test_runner_and_schedule_agree_on_the_bucket_of_every_timestep(
    runner: Runner, timestep: float
) -> None:
    buckets = TimestepBuckets(EDGES, (1 / BUCKETS,) * BUCKETS)
    assert runner.bucket_of(timestep) == buckets.index_of(timestep)


@pytest.mark.parametrize("timestep", [np.nan, np.inf, -np.inf])
def test_a_timestep_that_is_no_number_is_refused(runner: Runner, timestep: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        runner(**call(timestep))


def test_different_timesteps_of_one_bucket_run_together(runner: Runner) -> None:
    inputs = call((260.0, 500.0))
    np.testing.assert_array_equal(runner(**inputs), inputs["x"] * 2 + inputs["t"])


def test_timesteps_of_two_buckets_are_refused(runner: Runner) -> None:
    message = r"t \[250\.0, 250\.5\] lies in the timestep buckets \[0, 1\].*Split the call"
    with pytest.raises(UsageError, match=message):
        runner(**call((250.0, 250.5)))


def test_without_a_known_timestep_the_one_bucket_runs(tmp_path: Path) -> None:
    runner = load(write_toy(tmp_path, timestep=None, buckets=1))
    inputs = call((1.0, 999.0))
    np.testing.assert_array_equal(runner(**inputs), inputs["x"] + inputs["t"])


def test_several_outputs_come_as_a_tuple(tmp_path: Path) -> None:
    inputs = call(300.0)
    found = load(write_toy(tmp_path, two_outputs=True))(**inputs)
    assert isinstance(found, tuple)
    np.testing.assert_array_equal(found[1], inputs["x"] - 1)


def test_anything_that_numpy_reads_is_an_array(runner: Runner) -> None:
    import torch

    inputs = {name: torch.from_numpy(array) for name, array in call().items()}
    np.testing.assert_array_equal(runner(**inputs), runner(**call()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, r"x has shape \(2, 4\), expected \(2, 3\)"),
        ({"x": np.zeros((1, 3), np.float32)}, r"x has shape \(1, 3\), expected \(2, 3\)"),
        ({"t": np.float32(3)}, r"t has shape \(\), expected \(2, 1\)"),
        ({"x": np.zeros((2, 3))}, r"x is float64, expected float32; pass x\.astype"),
        ({"label": np.zeros(2, np.int32)}, "label is int32, expected int64"),
        ({"y": 1}, r"missing: \[\], unknown: \['y'\]"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_and_told_what_was_built(
    runner: Runner, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        runner(**call(**changes))
    assert "x float32[2, 3], t float32[2, 1], label int64[2]" in str(caught.value)


@pytest.mark.parametrize("kind", ["with grad", "bfloat16", "meta", "ragged"])
def test_what_numpy_cannot_read_is_refused_with_the_call_that_makes_it_readable(
    runner: Runner, kind: str
) -> None:
    import torch

    x: Any = {
        "with grad": torch.zeros(2, 3, requires_grad=True),
        "bfloat16": torch.zeros(2, 3, dtype=torch.bfloat16),
        "meta": torch.zeros(2, 3, device="meta"),
        "ragged": [[1.0, 2.0], [3.0]],
    }[kind]
    with pytest.raises(
        UsageError, match=r"x\.detach\(\)\.float\(\)\.cpu\(\)\.numpy"
    ) as caught:
        runner(**call(x=x))
    assert caught.value.code == "DCR-U021"
    assert "x float32[2, 3], t float32[2, 1], label int64[2]" in str(caught.value)


def test_a_missing_input_is_named(runner: Runner) -> None:
    inputs = call()
    del inputs["label"]
    with pytest.raises(UsageError, match=r"missing: \['label'\]"):
        runner(**inputs)


@pytest.mark.parametrize("label", [10, 99, -11])
def test_a_label_that_the_model_does_not_have_is_refused_in_words(
    tmp_path: Path, label: int
) -> None:
    runner = load(device_artifact.write(tmp_path), threads=1)
    inputs = device_artifact.call(125.0)
    with pytest.raises(
        UsageError, match=rf"timestep bucket 0 .*idx={label}.*labels"
    ) as caught:
        runner(**{**inputs, "label": np.array([3, label])})
    assert caught.value.code == "DCR-U058"
    runner(**inputs)


def test_sessions_are_made_at_first_use_and_kept(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(path: Path, *options: Any) -> Any:
        made.append(path.name)
        return backend.make_session(path, *options)

    monkeypatch.setattr(onnx_backend, "make_session", counted)
    runner = Runner(toy)
    assert made == []
    for timestep in (900.0, 800.0, 100.0, 900.0):
        runner(**call(timestep))
    assert made == ["bucket_02.onnx", "bucket_00.onnx"]


def test_threads_of_one_bucket_do_not_spin_while_another_runs(runner: Runner) -> None:
    session = backend.make_session(runner.folder / "onnx/bucket_00.onnx", threads=2)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_tampered_artifact_does_not_load_unless_told_not_to_look(
    toy: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    shutil.copy(copy / "onnx/bucket_01.onnx", copy / "onnx/bucket_00.onnx")
    with pytest.raises(ArtifactError, match=r"bucket_00\.onnx was changed"):
        load(copy)
    load(copy, verify=False)


@pytest.mark.parametrize("name", ["onnx/bucket_01.onnx", "onnx/weights.bin"])
def test_a_file_that_is_changed_after_the_load_is_not_opened(
    toy: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    runner = load(copy, threads=1)
    runner(**call(100.0))
    atomic_write_bytes(copy / name, (copy / "onnx/bucket_00.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=name) as caught:
        runner(**call(300.0))
    assert caught.value.code == "DCR-A004"
    runner(**call(100.0))  # what is open already is of the artifact that was loaded


def test_a_file_that_is_changed_while_it_is_opened_does_not_run(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")

    def other(path: Path, *options: Any) -> Any:
        atomic_write_bytes(path, (copy / "onnx/bucket_00.onnx").read_bytes())
        return backend.make_session(path, *options)

    monkeypatch.setattr(onnx_backend, "make_session", other)
    runner = load(copy, threads=1)
    for _ in range(2):  # the session was not kept
        with pytest.raises(ArtifactError, match=r"bucket_01\.onnx"):
            runner(**call(300.0))


def test_a_file_that_was_only_copied_anew_after_the_load_is_opened(
    toy: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    runner = load(copy, threads=1)
    data = (copy / "onnx/bucket_01.onnx").read_bytes()
    atomic_write_bytes(copy / "onnx/bucket_01.onnx", data)
    np.testing.assert_array_equal(runner(**call(300.0)), load(toy)(**call(300.0)))


def test_a_change_is_found_also_where_size_and_time_are_the_old_ones(
    toy: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    path = copy / "onnx/bucket_01.onnx"
    runner, before = load(copy, threads=1), path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="was changed"):
        runner(**call(300.0))


def test_an_artifact_that_is_gone_after_the_load_is_said_in_words(
    toy: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    runner = load(copy, threads=1)
    shutil.rmtree(copy)
    with pytest.raises(ArtifactError, match="is missing"):
        runner(**call(300.0))


def test_a_closed_runner_refuses_to_run(toy: Path) -> None:
    runner = load(toy, threads=1)
    runner(**call())
    runner.close()
    runner.close()
    with pytest.raises(ResourceError, match="was closed"):
        runner(**call())


def test_a_file_that_is_no_onnx_is_refused_in_words(toy: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy, tmp_path / "copy")
    (copy / "onnx/bucket_00.onnx").write_bytes(b"no onnx")
    with pytest.raises(ArtifactError, match=r"cannot load .*bucket_00\.onnx"):
        load(copy, verify=False)(**call())


def test_a_type_without_kernels_is_no_damaged_file(tmp_path: Path) -> None:
    """ONNX Runtime has no convolution in float64."""
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape)
        for name, shape in (("x", (1, 1, 4, 4)), ("w", (1, 1, 2, 2)), ("y", (1, 1, 3, 3)))
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "wide", tensors[:2], tensors[2:]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "wide.onnx")
    with pytest.raises(UnsupportedModelError, match=r"no kernel .*Conv.*torch\.float32"):
        backend.make_session(tmp_path / "wide.onnx")


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        load(tmp_path / "nothing")


def test_an_unknown_provider_is_refused(toy: Path) -> None:
    with pytest.raises(UsageError, match=r"provider must be one of \['cpu', 'cuda'\]"):
        load(toy, provider="npu")


def test_too_few_threads_are_refused(toy: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        load(toy, threads=0)(**call())


class FakeOnnxRuntime:
    """An ONNX Runtime that says it has CUDA and then silently runs on the CPU, as the real one does."""

    __version__ = "0"

    class SessionOptions:
        def add_session_config_entry(self, key: str, value: str) -> None:
            pass

    def __init__(self, available: list[str]) -> None:
        self.available = available

    def get_available_providers(self) -> list[str]:
        return self.available

    def InferenceSession(self, *_: Any, **__: Any) -> Any:
        return self

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_provider_that_is_not_installed_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeOnnxRuntime(["CPUExecutionProvider"])
    monkeypatch.setattr(backend, "_onnxruntime", lambda: fake)
    with pytest.raises(EnvironmentMissingError, match=r"no CUDAExecutionProvider.*\[gpu\]"):
        load(toy, provider="cuda")


def test_a_silent_fallback_to_the_cpu_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeOnnxRuntime(["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(backend, "_onnxruntime", lambda: fake)
    with pytest.raises(EnvironmentMissingError, match="fell back to"):
        load(toy, provider="cuda")(**call())


def test_a_missing_onnxruntime_is_said_in_words(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentMissingError, match="onnxruntime is not installed"):
        load(toy)


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "diffusers", "pydantic", "safetensors", "rich")
    code = (
        "import sys; from diffcr_compile.runtime import load, Runner, euler_flow; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_running_an_artifact_loads_nothing_heavy(toy: Path) -> None:
    code = (
        "import sys, numpy as np; from diffcr_compile.runtime import load; "
        f"load({str(toy)!r})(x=np.zeros((2, 3), np.float32), t=np.ones((2, 1), np.float32), "
        "label=np.zeros(2, np.int64)); "
        "print([m for m in ('torch', 'onnx', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_the_dense_runner_is_called_like_a_runner(toy: Path) -> None:
    dense = DenseRunner(toy / "onnx/bucket_01.onnx", threads=1)
    np.testing.assert_array_equal(dense(**call(300.0)), load(toy)(**call(300.0)))


def test_a_dense_baseline_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"dense\.onnx does not exist"):
        DenseRunner(tmp_path / "dense.onnx")


# --------------------------------------------------------------------------------- sampler


def test_euler_ends_where_the_closed_form_does() -> None:
    # v = x: every step multiplies by 1 - 1/n, so the end is noise * (1 - 1/n)^n
    noise = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    found = euler_flow(lambda x, t: x, noise, 8)
    assert found.dtype == np.float32
    # float32 rounding of eight steps
    np.testing.assert_allclose(found, noise.astype(np.float64) * (7 / 8) ** 8, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_recovers_the_data_of_a_straight_path_in_any_number_of_steps(steps: int) -> None:
    generator = np.random.default_rng(1)
    data, noise = generator.standard_normal((2, 4, 5))
    found = euler_flow(lambda x, t: noise - data, noise, steps)
    np.testing.assert_allclose(found, data, atol=1e-12)  # float64 rounding


def test_euler_equals_a_loop_written_differently() -> None:
    noise = np.random.default_rng(2).standard_normal(6)

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        return np.sin(3 * x) + timestep / 1000

    x, t = noise.copy(), 1.0
    for _ in range(10):
        x = x - 0.1 * (np.sin(3 * x) + t)
        t = t - 0.1
    np.testing.assert_allclose(euler_flow(velocity, noise, 10), x, atol=1e-12)  # rounding of t


def test_euler_calls_with_falling_timesteps_that_hit_the_edges_exactly() -> None:
    seen: list[float] = []
    steps: list[tuple[int, int]] = []

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        seen.append(timestep)
        return x

    euler_flow(
        velocity, np.ones(1), 20, callback=lambda done, all_, _: steps.append((done, all_))
    )
    assert seen == [1000.0 * (1 - i / 20) for i in range(20)]
    assert {1000.0, 750.0, 500.0, 250.0} <= set(seen)
    assert steps == [(i + 1, 20) for i in range(20)]


def test_euler_scales_the_timestep_and_leaves_the_noise_alone() -> None:
    noise, seen = np.ones(2, np.float32), []
    euler_flow(lambda x, t: seen.append(t) or x, noise, 2, timestep_scale=1.0)  # type: ignore[func-returns-value]
    assert seen == [1.0, 0.5]
    np.testing.assert_array_equal(noise, np.ones(2))


def test_euler_refuses_what_is_no_velocity() -> None:
    with pytest.raises(
        UsageError, match=r"returned shape \(3,\) for a sample of shape \(2,\)"
    ):
        euler_flow(lambda x, t: np.zeros(3), np.zeros(2), 2)
    with pytest.raises(UsageError, match="steps must be at least 1"):
        euler_flow(lambda x, t: x, np.zeros(2), 0)
