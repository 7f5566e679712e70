"""Engines on a device: built, checked, refused, run; against a TensorRT and a CUDA that compute in numpy.

What the stand-ins demand is in tests/fakes. No GPU is needed, and nothing here says that real ones agree.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import gc
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffcr_compile.engine_plan import ENGINE_MODES, EngineMode, ProfileLayout, plan_engines
from diffcr_compile.errors import (
    AccuracyError,
    ArtifactError,
    EnvironmentMissingError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from diffcr_compile.export.device.builder import Built, adopt_unchecked, build_engines
from diffcr_compile.export.device.check import check_engines
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.layer_map import layer_rows
from diffcr_compile.export.device.trtexec import UNCHECKED
from diffcr_compile.folder_lock import locked
from diffcr_compile.manifest import hash_files, read_manifest, sha256_file, write_manifest
from diffcr_compile.runtime import Runner, load
from diffcr_compile.runtime import open_engines as open_engines_module
from diffcr_compile.runtime.device import this_device
from diffcr_compile.runtime.engine_files import OK_FILE, SIDECAR, made_from
from diffcr_compile.runtime.open_engines import open_device, open_unchecked
from diffcr_compile.runtime.tensorrt_backend import TensorRTBackend
from tests import device_artifact as small

FAKES = Path(__file__).parent / "fakes"
MIDDLES = [(a + b) / 2 for a, b in zip(small.EDGES, small.EDGES[1:], strict=False)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An Orin with TensorRT 10.3, here and in the processes that build; the state of its CUDA."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    _forget()
    from cuda.bindings import runtime as cudart

    yield cudart
    _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n in ("tensorrt", "cuda") or n.startswith("cuda.")]:
        del sys.modules[name]


def build(
    folder: Path,
    mode: EngineMode = "per_bucket",
    check: bool = True,
    layout: ProfileLayout = "pinned",
    **kw: Any,
) -> Built:
    manifest = read_manifest(folder)
    here = open_device()[2]
    plan = plan_engines(manifest, mode, layout)
    built = build_engines(folder, manifest, plan, here, BuildSettings(**kw))
    if check:
        check_engines(folder, manifest, built.folder, "tensorrt", 1e-4)
    return built


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def out(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "out"))


@pytest.fixture(scope="module")
def engines(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[EngineMode, Path]:
    """The artifact with checked engines, in each mode, to be copied."""
    made: dict[EngineMode, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKES))
        patch.setenv("PYTHONPATH", str(FAKES))
        _forget()
        for mode in ENGINE_MODES:
            made[mode] = Path(shutil.copytree(plain, tmp_path_factory.mktemp(mode) / "out"))
            build(made[mode], mode)
    _forget()
    return made


@pytest.fixture
def built(engines: dict[EngineMode, Path], tmp_path: Path, device: ModuleType) -> Path:
    return Path(shutil.copytree(engines["per_bucket"], tmp_path / "built"))


def folder_of(artifact: Path) -> Path:
    (sidecar,) = artifact.glob(f"engines/*/{SIDECAR}")
    return sidecar.parent


def script_built(artifact: Path, folder: Path, mode: str) -> None:
    """Leave the plans of a folder as ``build_on_device.sh`` leaves those that it built."""
    source = artifact / UNCHECKED
    source.mkdir()
    for plan in folder.glob("*.plan"):
        shutil.copy(plan, source)
        (source / f"{plan.name}.sha256").write_text(f"{sha256_file(plan)}  {plan.name}\n")
    (source / "board").write_text("\n")
    (source / "made_from").write_text(made_from(read_manifest(artifact)) + "\n")
    (source / "mode").write_text(f"{mode}\n")


# --------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("mode", ["per_bucket", "profiles"])
@pytest.mark.parametrize("swap", [False, True])
def test_both_modes_compute_what_numpy_does_in_every_bucket_and_every_order(
    engines: dict[EngineMode, Path], device: Any, mode: EngineMode, swap: bool
) -> None:
    runner = load(engines[mode], backend="tensorrt", swap=swap)
    for seed, bucket in enumerate([0, 1, 1, 1, 3, 2, 0, 0, 2, 1, 3, 3]):
        inputs = small.call(MIDDLES[bucket], seed)
        np.testing.assert_allclose(runner(**inputs), small.expected(inputs, bucket), atol=1e-5)
    runner.close()
    assert device.state.allocations == {}
    assert device.state.streams == set()
    assert device.state.graphs == {}
    with pytest.raises(ResourceError, match="closed"):
        runner(**small.call(100.0))


@pytest.mark.parametrize("swap", [False, True])
def test_buckets_share_a_spanning_profile_each_with_its_own_lengths(
    out: Path, device: Any, swap: bool
) -> None:
    built = build(out, "profiles", layout="spanning")  # every bucket gave its golden outputs
    import tensorrt

    facts = tensorrt.facts_of((built.folder / "profiles_00.plan").read_bytes())
    assert facts["profiles"] == [{"kept_a": [[4], [6], [8]]}]
    rows = json.loads((built.folder / "engine.ok.json").read_text())["buckets"]
    assert [row["bucket"] for row in rows] == [0, 1, 2, 3]
    runner = load(out, backend="tensorrt", swap=swap)
    for seed, bucket in enumerate([0, 1, 1, 1, 3, 2, 0, 0, 2, 1, 3, 3]):
        inputs = small.call(MIDDLES[bucket], seed)
        np.testing.assert_allclose(runner(**inputs), small.expected(inputs, bucket), atol=1e-5)
    runner.close()
    assert device.state.allocations == {}


@pytest.mark.parametrize(("mode", "expected"), [("profiles", {1}), ("per_bucket", {None})])
def test_tensorrt_rtx_specialises_kernels_for_open_lengths_before_a_cuda_graph_keeps_them(
    engines: dict[EngineMode, Path],
    device: Any,
    monkeypatch: pytest.MonkeyPatch,
    mode: EngineMode,
    expected: set[int | None],
) -> None:
    monkeypatch.setenv("FAKE_TRT_RTX", "1")
    _forget()
    runner = load(engines[mode], backend="tensorrt")
    contexts = runner.backend._loaded.contexts.values()  # type: ignore[attr-defined]
    assert {entry.context.specialization for entry in contexts} == expected
    runner.close()


def test_what_the_script_built_is_taken_in_the_layout_that_it_was_built_in(
    out: Path, device: Any
) -> None:
    built = build(out, "profiles", layout="spanning")
    script_built(out, built.folder, "profiles spanning")
    taken = adopt_unchecked(out, read_manifest(out), open_device()[2])
    assert taken is not None
    assert taken.sidecar.plan == built.sidecar.plan


@pytest.mark.parametrize("words", ["f" * 64, None])
def test_what_the_script_of_another_artifact_built_is_not_taken(
    built: Path, words: str | None
) -> None:
    script_built(built, folder_of(built), "per_bucket pinned")
    path = built / UNCHECKED / "made_from"
    path.unlink() if words is None else path.write_text(words)
    with pytest.raises(ArtifactError, match=r"build_on_device\.sh for .*again") as caught:
        adopt_unchecked(built, read_manifest(built), open_device()[2])
    assert caught.value.code == "DCR-A012"


@pytest.mark.parametrize(
    ("model", "gigabytes", "words"),
    [
        (b"NVIDIA Jetson Orin NX\0", 8, r"\(NVIDIA Jetson Orin NX, 8 GB\).*Orin NX differs"),
        (b"NVIDIA Jetson AGX Orin\0", 64, r"this is Orin \(.*64 GB\).*: 64 GB differs"),
        (b"NVIDIA Jetson AGX Orin\0", 9, ""),
    ],
)
def test_another_module_with_the_same_gpu_is_another_device(
    out: Path, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: bytes, gigabytes: int, words: str,
) -> None:  # fmt: skip
    file = tmp_path / "proc/device-tree/model"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"NVIDIA Jetson AGX Orin\0")
    monkeypatch.setattr(
        open_engines_module, "this_device", functools.partial(this_device, root=tmp_path)
    )
    build(out)
    file.write_bytes(model)
    device.state.total = gigabytes * 10**9
    if not words:
        load(out, backend="tensorrt").close()
        return
    with pytest.raises(ArtifactError, match=words) as caught:
        load(out, backend="tensorrt")
    assert caught.value.code == "DCR-A010"
    with pytest.raises(ArtifactError, match=words):
        check_engines(out, read_manifest(out), folder_of(out), "tensorrt", 1e-4)


def test_what_the_script_built_on_another_board_is_not_taken(built: Path) -> None:
    script_built(built, folder_of(built), "per_bucket pinned")
    (built / UNCHECKED / "board").write_text("NVIDIA Jetson AGX Orin\n")
    with pytest.raises(
        ArtifactError, match=r"the board NVIDIA.*this is Orin \(8 GB\)"
    ) as caught:
        adopt_unchecked(built, read_manifest(built), open_device()[2])
    assert caught.value.code == "DCR-A010"


def test_engines_built_ahead_of_time_cannot_be_checked_into_use(built: Path) -> None:
    edited(ahead_of_time=True)(folder_of(built))
    with pytest.raises(ArtifactError, match="built ahead of time") as caught:
        check_engines(built, read_manifest(built), folder_of(built), "tensorrt", 1e-4)
    assert caught.value.code == "DCR-A013"


def test_threads_may_share_a_runner(built: Path) -> None:
    runner = load(built, backend="tensorrt", swap=True)

    def one(number: int) -> bool:
        bucket = number % 4
        inputs = small.call(MIDDLES[bucket], number)
        return np.allclose(runner(**inputs), small.expected(inputs, bucket), atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(64)))


def test_the_work_of_a_context_is_recorded_once_and_replayed(built: Path, device: Any) -> None:
    runner = load(built, backend="tensorrt")
    for seed in range(5):
        inputs = small.call(100.0, seed)
        np.testing.assert_allclose(runner(**inputs), small.expected(inputs, 0), atol=1e-5)
    assert device.state.launches == 4  # all but the first run
    assert len(device.state.graphs) == 1
    runner.close()
    device.reset()
    plain = load(built, backend="tensorrt", cuda_graphs=False)
    for seed in range(3):
        inputs = small.call(100.0, seed)
        np.testing.assert_allclose(plain(**inputs), small.expected(inputs, 0), atol=1e-5)
    assert device.state.launches == 0


def test_work_that_cuda_cannot_record_runs_without_and_says_so(
    built: Path, device: Any
) -> None:
    device.state.can_capture = False
    runner = load(built, backend="tensorrt")
    for seed in range(3):
        inputs = small.call(100.0, seed)
        np.testing.assert_allclose(runner(**inputs), small.expected(inputs, 0), atol=1e-5)
    assert len(runner.backend.remarks) >= 1
    assert "without a CUDA graph" in runner.backend.remarks[0]


def test_buckets_share_inputs_outputs_and_one_activation_buffer(
    built: Path, device: Any
) -> None:
    runner = load(built, backend="tensorrt")
    tensors = len(small.INPUTS) + 1
    assert len(device.state.allocations) == tensors + 1
    for middle in MIDDLES:
        runner(**small.call(middle))
    assert len(device.state.allocations) == tensors + 1


def test_swap_keeps_one_engine_and_loading_all_keeps_three(built: Path, device: Any) -> None:
    import tensorrt

    runner = load(built, backend="tensorrt")
    assert tensorrt._Engine.alive == 3
    runner.close()
    swapping = load(built, backend="tensorrt", swap=True)
    assert tensorrt._Engine.alive == 0
    for middle in MIDDLES:
        swapping(**small.call(middle))
        assert tensorrt._Engine.alive == 1


def test_too_little_memory_is_said_before_a_plan_is_read(built: Path, device: Any) -> None:
    sizes = [path.stat().st_size for path in folder_of(built).glob("*.plan")]
    device.state.taken = device.state.total - (sum(sizes) - 1)
    with pytest.raises(ResourceError, match=r"need more than .* MB.*swap=True") as caught:
        load(built, backend="tensorrt")
    assert caught.value.code == "DCR-R003"


def test_an_allocation_that_fails_is_a_resource_error(built: Path, device: Any) -> None:
    sizes = [path.stat().st_size for path in folder_of(built).glob("*.plan")]
    device.state.taken = device.state.total - sum(sizes)
    device.state.allocations[1 << 40] = (
        device.ctypes.c_char * (sum(sizes) - max(sizes) - 10)
    )()
    with pytest.raises(ResourceError, match=r"out of memory|need more than"):
        load(built, backend="tensorrt", swap=True)


def test_what_was_allocated_before_the_device_was_full_is_given_back(
    built: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_malloc = device.cudaMalloc

    def full(size: int) -> tuple[int, int]:
        if len(device.state.allocations) == 2:
            return 2, 0
        found: tuple[int, int] = cuda_malloc(size)
        return found

    monkeypatch.setattr(device, "cudaMalloc", full)
    with pytest.raises(ResourceError, match="out of memory"):
        load(built, backend="tensorrt")
    assert device.state.allocations == {}
    assert device.state.streams == set()


def test_a_runner_that_is_dropped_gives_its_memory_back(built: Path, device: Any) -> None:
    runner = load(built, backend="tensorrt")
    for seed in range(3):
        runner(**small.call(100.0, seed))
    assert device.state.graphs
    del runner
    gc.collect()
    assert device.state.allocations == {}
    assert device.state.streams == set()
    assert device.state.graphs == {}


def test_closing_waits_for_a_run_in_another_thread(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(built, backend="tensorrt", cuda_graphs=False)
    inputs = small.call(100.0)
    threads: list[threading.Thread] = []
    execute = TensorRTBackend._execute

    def slow(*arguments: Any) -> None:
        threads.append(threading.Thread(target=runner.close))
        threads[0].start()
        threads[0].join(0.2)
        assert threads[0].is_alive()
        execute(*arguments)

    monkeypatch.setattr(TensorRTBackend, "_execute", slow)
    np.testing.assert_allclose(runner(**inputs), small.expected(inputs, 0), atol=1e-5)
    threads[0].join(10)
    with pytest.raises(ResourceError, match="closed"):
        runner(**inputs)


def test_options_of_the_other_backend_are_refused(built: Path) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime's"):
        load(built, backend="tensorrt", threads=2)
    with pytest.raises(UsageError, match="swap"):
        load(built, swap=True)
    with pytest.raises(UsageError, match="backend must be one of"):
        Runner(built, backend="tvm")  # type: ignore[arg-type]


def test_without_a_gpu_or_its_packages_the_error_says_what_is_missing(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with pytest.raises(EnvironmentMissingError, match="finds no device") as caught:
        load(built, backend="tensorrt")
    assert caught.value.code == "DCR-E003"
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    with pytest.raises(EnvironmentMissingError, match="pip install 'cuda-python"):
        load(built, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentMissingError, match="comes with JetPack") as caught:
        load(built, backend="tensorrt")
    assert caught.value.code == "DCR-E002"


# --------------------------------------------------------------------------------------- refusals


def no_ok(folder: Path) -> None:
    (folder / OK_FILE).unlink()


def ok_of_others(folder: Path) -> None:
    text = (folder / SIDECAR).read_text()
    (folder / SIDECAR).write_text(text.replace('"created": "', '"created": "x'))


def changed(folder: Path) -> None:
    path = sorted(folder.glob("*.plan"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("*.plan"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def missing(folder: Path) -> None:
    sorted(folder.glob("*.plan"))[2].unlink()


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / SIDECAR).read_text())
        for key, value in changes.items():
            if key in data["device"]:
                data["device"][key] = value
            else:
                data[key] = value
        (folder / SIDECAR).write_text(json.dumps(data))

    return edit


def no_sidecar(folder: Path) -> None:
    shutil.rmtree(folder)


def no_json(folder: Path) -> None:
    (folder / SIDECAR).write_text("{")


def a_path_out(folder: Path) -> None:
    data = json.loads((folder / SIDECAR).read_text())
    data["plan"]["engines"][0]["name"] = "../../onnx/bucket_00"
    (folder / SIDECAR).write_text(json.dumps(data))


REFUSALS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("DCR-A013", r"never compared with the golden outputs", no_ok),
    ("DCR-A013", r"never compared", ok_of_others),
    ("DCR-A013", r"built ahead of time and never compared", edited(ahead_of_time=True)),
    ("DCR-A011", r"was changed: its sha256", changed),
    ("DCR-A011", r"bytes, its sidecar says .*truncated", truncated),
    ("DCR-A011", r"is missing", missing),
    (
        "DCR-A010",
        r"built for Orin \(8 GB\), SM86.*this is Orin \(8 GB\), SM87.*SM87 differs",
        edited(sm=86),
    ),
    ("DCR-A010", r"built for Orin Nano.*the name Orin differs", edited(name="Orin Nano")),
    (
        "DCR-A010",
        r"built for Orin \(AGX, 8 GB\).*board without a name differs",
        edited(board="AGX"),
    ),
    ("DCR-A010", r"built for Orin \(64 GB\).*: 8 GB differs", edited(memory_gb=64)),
    ("DCR-A010", r"tensorrt 10\.3\.0 differs", edited(version="10.13.3")),
    ("DCR-A012", r"made of other graphs or weights", edited(made_from="0" * 64)),
    ("DCR-A009", r"has no engines for Orin", no_sidecar),
    ("DCR-A011", r"cannot be read", no_json),
    ("DCR-A011", r"its version is '2', this runtime reads 3", edited(sidecar_version=2)),
    ("DCR-A011", r"cannot be read: its version", edited(sidecar_version=99)),
    ("DCR-A011", r"cannot be read.*whole number", edited(memory_gb="8")),
    ("DCR-A011", r"cannot be read", edited(files={})),
    ("DCR-A011", r"cannot be read", edited(plan={"mode": "profiles"})),
    ("DCR-A011", r"cannot be read.*letters, digits", a_path_out),
    ("DCR-A011", r"cannot be read", edited(runtime="opencl")),
]


@pytest.mark.parametrize(("code", "message", "damage"), REFUSALS)
def test_engines_that_may_not_run_are_refused_with_the_command_that_builds_them_anew(
    built: Path, code: str, message: str, damage: Callable[[Path], None]
) -> None:
    damage(folder_of(built))
    with pytest.raises(ArtifactError, match=message) as caught:
        load(built, backend="tensorrt")
    assert (caught.value.code, caught.value.exit_code) == (code, 7)
    assert "diffcr build" in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value"), [("FAKE_CUDA_SM", "110"), ("FAKE_TRT_VERSION", "10.13.3")]
)
def test_on_another_device_the_engines_that_are_there_are_named(
    built: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    _forget()
    with pytest.raises(ArtifactError, match=r"only those in orin_sm87_trt10\.3\.0") as caught:
        load(built, backend="tensorrt")
    assert caught.value.code == "DCR-A010"


def test_engines_of_another_artifact_are_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "KEPT", (5, 8, 6, 8))
    other = small.write(tmp_path / "other")
    shutil.copytree(built / "engines", other / "engines")
    with pytest.raises(ArtifactError, match="other graphs or weights") as caught:
        load(other, backend="tensorrt")
    assert caught.value.code == "DCR-A012"


@pytest.mark.parametrize("mode", ENGINE_MODES)
def test_engines_of_another_schedule_over_the_same_graphs_are_refused_and_not_built_anew(
    engines: dict[EngineMode, Path], tmp_path: Path, device: Any, mode: EngineMode
) -> None:
    out = Path(shutil.copytree(engines[mode], tmp_path / "out"))
    manifest = read_manifest(out)
    rows = [dict(row) for row in manifest.buckets]
    rows[3]["onnx"], kept = rows[2]["onnx"], [*small.KEPT[:3], small.KEPT[2]]
    other = dataclasses.replace(manifest, buckets=rows, schedule={"a": kept})
    write_manifest(out, other)
    with pytest.raises(ArtifactError, match="other timestep buckets, kept tokens") as caught:
        load(out, backend="tensorrt")
    assert caught.value.code == "DCR-A012"
    with pytest.raises(ArtifactError, match="other timestep buckets, kept tokens"):
        check_engines(out, other, folder_of(out), "tensorrt", 1e-4)
    kept_plans = build(out, "per_bucket", check=False).kept
    assert len(kept_plans) == (3 if mode == "per_bucket" else 0)


def test_engines_of_other_edges_are_refused(built: Path) -> None:
    manifest = read_manifest(built)
    rows = [dict(row) for row in manifest.buckets]
    rows[1]["high"] += 1
    rows[2]["low"] += 1
    write_manifest(built, dataclasses.replace(manifest, buckets=rows))
    with pytest.raises(ArtifactError, match="other timestep buckets") as caught:
        load(built, backend="tensorrt")
    assert caught.value.code == "DCR-A012"


def test_no_flipped_byte_of_an_engine_folder_leads_to_another_result(
    engines: dict[EngineMode, Path], tmp_path: Path, device: Any
) -> None:
    """80 bytes, anywhere in what a load reads: refused with exit code 7, or without effect."""
    generator = np.random.default_rng(7)
    out = Path(shutil.copytree(engines["profiles"], tmp_path / "out"))
    folder = folder_of(out)
    files = [folder / SIDECAR, folder / OK_FILE, *folder.glob("*.plan")]
    inputs = small.call(600.0)
    statuses = []
    for number in range(80):
        path = files[number % len(files)]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(data))
        try:
            runner = load(out, backend="tensorrt", swap=True)
            np.testing.assert_allclose(runner(**inputs), small.expected(inputs, 2), atol=1e-5)
            runner.close()
            assert path.name == OK_FILE  # figures in it say nothing to the runtime
        except ArtifactError as error:
            statuses.append(error.exit_code)
        path.write_bytes(whole)
    assert set(statuses) == {7}
    assert len(statuses) >= 50  # the sidecar and the plan, whatever the byte


def test_a_changed_plan_loads_only_where_one_asked_not_to_look(built: Path) -> None:
    folder = folder_of(built)
    path = sorted(folder.glob("*.plan"))[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"tf32": false', b'"tf32":  true'))
    with pytest.raises(ArtifactError, match="was changed"):
        load(built, backend="tensorrt")
    load(built, backend="tensorrt", verify=False)


def test_a_plan_that_was_replaced_while_a_runner_swaps_is_not_run(built: Path) -> None:
    runner = load(built, backend="tensorrt", swap=True)
    runner(**small.call(MIDDLES[0]))
    path = folder_of(built) / "bucket_01.plan"
    path.write_bytes(path.read_bytes().replace(b'"tf32": false', b'"tf32":  true'))
    with pytest.raises(ArtifactError, match=r"bucket_01\.plan was changed") as caught:
        runner(**small.call(MIDDLES[1]))
    assert caught.value.code == "DCR-A011"
    path.unlink()
    with pytest.raises(ArtifactError, match=r"bucket_01\.plan is missing"):
        runner(**small.call(MIDDLES[1]))


@pytest.mark.parametrize(
    ("key", "row", "message"),
    [
        ("outputs", {"shape": [2, 16, 9]}, r"output float32\[2, 16, 8\], the artifact float32\[2, 16, 9\]"),
        ("outputs", {"name": "o", "shape": [4]}, r"has as o nothing, the artifact float32\[4\]"),
        ("outputs", {"dtype": "float16"}, r"float32\[2, 16, 8\], the artifact float16"),
        ("inputs", {"shape": [2, 8, 8]}, r"has as x float32\[2, 16, 8\], the artifact float32\[2, 8, 8\]"),
        ("inputs", {"dtype": "complex64", "shape": [2, 16, 4]}, r"the artifact float32\[2, 16, 4, 2\]"),
    ],
)  # fmt: skip
def test_an_engine_with_other_tensors_than_the_manifest_is_not_opened(
    built: Path, device: Any, key: str, row: dict[str, Any], message: str
) -> None:
    manifest = read_manifest(built)
    first, *rest = getattr(manifest, key)
    other = dataclasses.replace(manifest, **{key: [{**first, **row}, *rest]})
    sidecar = json.loads((folder_of(built) / SIDECAR).read_text())
    sidecar["made_from"] = made_from(other)
    (folder_of(built) / SIDECAR).write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactError, match=message) as caught:
        open_unchecked(folder_of(built), other).run(0, {})
    assert caught.value.code == "DCR-A012"


def test_a_size_that_an_engine_leaves_open_is_looked_at_in_its_contexts(
    engines: dict[EngineMode, Path], device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_OUTPUT_TOKENS", "16")
    inputs = small.call(MIDDLES[0])
    found = load(engines["profiles"], backend="tensorrt")(**inputs)
    np.testing.assert_allclose(found, small.expected(inputs, 0), atol=1e-5)
    with pytest.raises(ArtifactError, match=r"output float32\[2, -1, 8\], the artifact"):
        load(engines["per_bucket"], backend="tensorrt")  # no length is open there
    monkeypatch.setenv("FAKE_TRT_OUTPUT_TOKENS", "17")
    with pytest.raises(
        ArtifactError, match="outputs of other shapes than the manifest"
    ) as caught:
        load(engines["profiles"], backend="tensorrt")
    assert caught.value.code == "DCR-A011"


# --------------------------------------------------------------------------------------- building


def test_a_build_is_strongly_typed_without_tf32_and_pins_each_profile(
    out: Path, device: Any
) -> None:
    import tensorrt

    built = build(out, "profiles", check=False, workspace_mb=64)
    facts = tensorrt.facts_of((built.folder / "profiles_00.plan").read_bytes())
    assert facts["strongly_typed"]
    assert not facts["tf32"]
    assert facts["workspace"] == 64 << 20
    assert facts["profiles"] == [{"kept_a": [[kept]] * 3} for kept in (4, 8, 6)]
    assert facts["extra_memory"] == [1.0, 0.0, 0.0]
    assert built.folder.name == "orin_sm87_trt10.3.0"


def test_tensorrt_11_has_no_flag_for_strong_typing(
    out: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_VERSION", "11.4.1")
    _forget()
    built = build(out, "profiles")
    assert built.folder.name == "orin_sm87_trt11.4.1"
    assert load(out, backend="tensorrt")(**small.call(100.0)).shape == (2, 16, 8)


def test_later_engines_use_what_earlier_ones_measured(built: Path) -> None:
    import tensorrt

    plans = sorted(folder_of(built).glob("*.plan"))
    assert [tensorrt.facts_of(p.read_bytes())["timing"] for p in plans] == [0, 1, 2]


def test_a_killed_build_goes_on_at_the_engine_it_was_in(
    out: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_KILL", "bucket_01.onnx")
    with pytest.raises(
        ResourceError, match=r"bucket_01 was killed.*swap.*goes on at"
    ) as caught:
        build(out)
    assert (caught.value.code, caught.value.exit_code) == ("DCR-R002", 5)
    (folder,) = (out / "engines").iterdir()
    assert [p.name for p in folder.glob("*.plan")] == ["bucket_00.plan"]
    first = (folder / "bucket_00.plan").stat().st_mtime_ns
    with pytest.raises(ArtifactError, match="has no engines"):
        load(out, backend="tensorrt")
    monkeypatch.delenv("FAKE_TRT_KILL")
    assert build(out).kept == ("bucket_00",)
    assert (folder / "bucket_00.plan").stat().st_mtime_ns == first
    assert load(out, backend="tensorrt")(**small.call(400.0)).shape == (2, 16, 8)


def test_nothing_runs_after_a_rebuild_that_was_killed_not_even_unhashed(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_KILL", "bucket_01.onnx")
    with pytest.raises(ResourceError, match="was killed"):
        build(built, workspace_mb=9)
    with pytest.raises(ArtifactError, match="never compared") as caught:
        load(built, backend="tensorrt", verify=False)
    assert caught.value.code == "DCR-A013"


def test_a_build_that_finds_everything_built_takes_nothing_back_before_its_end(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(folder: Path, sidecar: Any) -> None:
        found.append((folder / OK_FILE).is_file())

    monkeypatch.setattr("diffcr_compile.export.device.builder.write_sidecar", look)
    build(built, check=False)
    build(built, check=False, workspace_mb=9)
    assert found == [True, False]


def test_nothing_runs_after_taking_the_scripts_engines_was_killed(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffcr_compile.export.device.builder._put", killed)
    script_built(built, folder_of(built), "per_bucket pinned")
    with pytest.raises(KeyboardInterrupt):
        adopt_unchecked(built, read_manifest(built), open_device()[2])
    with pytest.raises(ArtifactError, match="never compared"):
        load(built, backend="tensorrt", verify=False)


def test_a_finished_engine_is_built_again_if_it_was_changed_or_is_asked_for_otherwise(
    engines: dict[EngineMode, Path], tmp_path: Path, device: Any
) -> None:
    out = Path(shutil.copytree(engines["profiles"], tmp_path / "out"))
    assert build(out, "profiles", check=False).kept == ("profiles_00",)
    changed(folder_of(out))
    assert build(out, "profiles", check=False).kept == ()
    assert build(out, "profiles", check=False, workspace_mb=32).kept == ()


def test_a_graph_that_tensorrt_refuses_is_named_with_its_words(out: Path, device: Any) -> None:
    import onnx
    from onnx import helper

    from diffcr_compile.export.device.tensorrt_api import build_engine
    from diffcr_compile.runtime.device import tensorrt_module

    model = small.graph(4)
    model.graph.node.append(helper.make_node("NonZero", ["x"], ["where"]))
    onnx.save(model, str(out / "refused.onnx"))
    with pytest.raises(UnsupportedModelError, match=r"refused\.onnx: no importer for NonZero"):
        build_engine(tensorrt_module(), out / "refused.onnx", [{}], BuildSettings())


def test_layers_of_a_checked_engine_lead_back_to_modules(built: Path) -> None:
    found = json.loads((folder_of(built) / "layers.json").read_text())
    assert set(found) == {"bucket_00", "bucket_01", "bucket_02"}
    for rows in found.values():
        (row,) = (row for row in rows if "matmul_a" in row["nodes"])
        assert row["modules"] == ["a.to_q"]
        assert row["type"] == "kgen"
        assert all(set(other["modules"]) <= {"a.to_q"} for other in rows)


def test_layers_without_details_have_names_only() -> None:
    rows = list(layer_rows('{"Layers": ["conv + relu"]}', {"Conv_0": "proj"}))
    assert rows == [{"layer": "conv + relu", "type": "", "nodes": [], "modules": []}]


def test_progress_is_told_by_engine_and_outer_phase(out: Path, device: Any) -> None:
    manifest, here = read_manifest(out), open_device()[2]
    said: list[tuple[str, int, int]] = []
    plan = plan_engines(manifest, "profiles")
    build_engines(
        out, manifest, plan, here, BuildSettings(), lambda *event: said.append(event)
    )
    assert said[0] == ("profiles_00: building", 0, 2)
    assert said[-1] == ("profiles_00: building", 2, 2)
    assert not any("inner" in what for what, _, _ in said)


def test_an_engine_that_computes_something_else_stays_unusable(
    out: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_WRONG", "bucket_02.onnx")
    with pytest.raises(
        AccuracyError, match=r"1 of 4 .*bucket 2: relative L2 5\.0e-01"
    ) as caught:
        build(out)
    assert (caught.value.code, caught.value.exit_code) == ("DCR-Q002", 6)
    with pytest.raises(ArtifactError, match="never compared"):
        load(out, backend="tensorrt")
    assert os.listdir(folder_of(out)).count(OK_FILE) == 0


def test_a_check_says_nothing_about_engines_that_came_while_it_ran(built: Path) -> None:
    folder, manifest = folder_of(built), read_manifest(built)

    class Rebuilt:
        def run(self, bucket: int, arrays: Any) -> list[Any]:
            edited(created="later")(folder)
            return [small.expected(arrays, bucket)]

    with pytest.raises(ArtifactError, match="was changed while its engines") as caught:
        check_engines(built, manifest, folder, "tensorrt", 1e-4, backend=Rebuilt())
    assert caught.value.code == "DCR-A011"
    assert not (folder / OK_FILE).exists()


def test_nobody_builds_or_adopts_engines_while_they_are_checked_and_the_other_way_round(
    built: Path,
) -> None:
    folder, manifest = folder_of(built), read_manifest(built)

    class Building:
        def run(self, bucket: int, arrays: Any) -> list[Any]:
            build(built, workspace_mb=9)
            return []

    with pytest.raises(UsageError, match="another diffcr run is at work"):
        check_engines(built, manifest, folder, "tensorrt", 1e-4, backend=Building())
    script_built(built, folder, "per_bucket pinned")
    with locked(folder):
        with pytest.raises(UsageError, match="another diffcr run is at work"):
            check_engines(built, manifest, folder, "tensorrt", 1e-4)
        with pytest.raises(UsageError, match="another diffcr run is at work") as caught:
            adopt_unchecked(built, manifest, open_device()[2])
    assert caught.value.code == "DCR-U017"


def test_a_check_that_fails_takes_an_earlier_permission_back(built: Path) -> None:
    folder, manifest = folder_of(built), read_manifest(built)
    load(built, backend="tensorrt").close()

    class Zeros:
        def run(self, bucket: int, arrays: Any) -> list[Any]:
            return [np.zeros((2, 16, 8), np.float32)]

    with pytest.raises(AccuracyError):
        check_engines(built, manifest, folder, "tensorrt", 1e-4, backend=Zeros())
    with pytest.raises(ArtifactError, match="never compared"):
        load(built, backend="tensorrt")


@pytest.mark.parametrize("name", ["golden/bucket_01.safetensors", "model/node_map.json"])
def test_a_check_holds_engines_to_nothing_that_is_not_the_manifests(
    built: Path, name: str
) -> None:
    folder, manifest = folder_of(built), read_manifest(built)
    (built / name).write_bytes((built / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=name) as caught:
        check_engines(built, manifest, folder, "tensorrt", 1e-4)
    assert caught.value.code == "DCR-A004"
    with pytest.raises(ArtifactError, match="never compared"):
        load(built, backend="tensorrt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input.x": np.zeros((9, 16, 8), np.float32)}, r"float32\[9, 16, 8\], the manifest"),
        ({"input.t": np.zeros(2)}, r"input t float64\[2\], the manifest says float32\[2\]"),
        ({"input.label": None}, r"as input label nothing, the manifest says int64\[2\]"),
        ({"input.more": np.zeros(2)}, r"input more float64\[2\], the manifest says nothing"),
        ({"output.output": None, "output.o": np.zeros(2)}, r"output\.o.*expected inputs and"),
    ],
)
def test_golden_inputs_that_do_not_fit_the_engines_are_refused_before_they_are_copied(
    built: Path, changes: dict[str, Any], message: str
) -> None:
    path = built / "golden/bucket_02.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    manifest = dataclasses.replace(read_manifest(built), files=hash_files(built))
    with pytest.raises(ArtifactError, match=message) as caught:
        check_engines(built, manifest, folder_of(built), "tensorrt", 1e-4)
    assert caught.value.code == "DCR-A004"


def test_a_map_of_nodes_of_another_form_is_refused_in_words(built: Path) -> None:
    (built / "model/node_map.json").write_text("[1]")
    manifest = dataclasses.replace(read_manifest(built), files=hash_files(built))
    with pytest.raises(ArtifactError, match=r"node_map\.json cannot be read: expected"):
        check_engines(built, manifest, folder_of(built), "tensorrt", 1e-4)


def test_a_build_reads_no_graph_that_is_not_the_manifests(out: Path, device: Any) -> None:
    shutil.copy(out / "onnx/bucket_01.onnx", out / "onnx/bucket_00.onnx")
    with pytest.raises(ArtifactError, match=r"bucket_00\.onnx"):
        build(out)


@pytest.mark.parametrize("schedule", [None, True, -1, 0.5, [], ""])
def test_a_manifest_whose_schedule_is_no_mapping_is_refused_in_words(
    out: Path, schedule: Any
) -> None:
    damaged = dataclasses.replace(read_manifest(out), schedule=schedule)
    write_manifest(out, damaged)
    with pytest.raises(ArtifactError, match="schedule must map blocks") as caught:
        load(out)
    assert caught.value.code == "DCR-A002"
