"""What only a CUDA device can show; run with ``pytest -m gpu``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.utils import counters

import diffcr_compile as dcr
from diffcr_compile.budgets import cost_table
from diffcr_compile.config import CompileConfig, RoutingConfig, make_config
from diffcr_compile.dynamo_backend import diffcr
from diffcr_compile.full_float32 import full_float32
from diffcr_compile.latency_bench import measure_latency
from diffcr_compile.program import with_batch
from diffcr_compile.stages import sampling_states
from tests import models
from tests.conftest import equal, flat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# The same float32 products in other kernels: the order of sums. A wrong token is off by 0.1 and more.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# Relative L2 of float16: rounding is below 5e-3; the rest is for a token or two of equal score that swap.
HALF = 0.03
CALIBRATION: dict[str, Any] = {
    "routing": {"buckets": 2, "multiple_of": 8},
    "rollouts": {"trajectories": 8, "steps": 4, "batch": 4},
    "calibration": {"steps": 6, "batch": 4, "save_every": 2},
}
EDGE = 500.0


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with full_float32():
        yield


def on_cuda(name: str) -> models.Example:
    model, inputs = getattr(models, f"tiny_{name}")()
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model.cuda(), moved


def settings(**calibration: Any) -> CompileConfig:
    return make_config(
        {**CALIBRATION, "calibration": {**CALIBRATION["calibration"], **calibration}}
    )


def two_buckets(routed: dcr.DiTGraph) -> tuple[dcr.DiTGraph, ...]:
    specs = routed.program.blocks
    schedule = dcr.TokenSchedule(
        {s.name: (s.num_tokens // 4, s.num_tokens // 2) for s in specs},
        {s.name: s.num_tokens for s in specs},
        dcr.TimestepBuckets((0.0, EDGE, 1000.0), (0.5, 0.5)),
    )
    return dcr.freeze(routed, schedule=schedule)


def at_timestep(inputs: dict[str, Any], value: float) -> dict[str, Any]:
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], value)}


def assert_near(found: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), **(tolerance or CLOSE))


# --------------------------------------------------------------------------- route, freeze, costs


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_all_kept_is_bit_equal_on_cuda(name: str) -> None:
    model, inputs = on_cuda(name)
    routed = dcr.route(model, inputs)
    assert {p.device.type for p in routed.parameters()} == {"cuda"}
    with torch.no_grad():
        assert equal(routed(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_frozen_on_cuda_is_frozen_on_the_cpu(name: str) -> None:
    model, inputs = on_cuda(name)
    (found,) = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    cpu_model, cpu_inputs = getattr(models, f"tiny_{name}")()
    (expected,) = dcr.freeze(dcr.route(cpu_model, cpu_inputs), keep_ratio=0.5)
    with torch.no_grad():
        assert_near(found(**inputs), expected(**cpu_inputs))


def test_half_precision_runs_with_routers_in_float32() -> None:
    model, inputs = on_cuda("dit")
    narrow = {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}
    narrow["timestep"] = inputs["timestep"]
    (frozen,) = dcr.freeze(dcr.route(model.half(), narrow), keep_ratio=0.5)
    routers = [p for name, p in frozen.named_parameters() if "_router" in name]
    assert {p.dtype for p in routers} == {torch.float32}
    with torch.no_grad():
        (output,) = flat(frozen(**narrow))
    assert output.dtype == torch.float16
    assert bool(output.isfinite().all())


def test_another_batch_and_the_costs_are_those_of_the_cpu() -> None:
    model, inputs = on_cuda("dit")
    routed = dcr.route(model, inputs).program
    (frozen,) = dcr.freeze(with_batch(routed, 3).module, keep_ratio=0.5)
    with torch.no_grad():
        (output,) = flat(frozen(**frozen.program.example))
    assert output.shape[0] == 3
    cpu_model, cpu_inputs = models.tiny_dit()
    config = RoutingConfig(multiple_of=8)
    found = cost_table(routed, config)
    expected = cost_table(dcr.route(cpu_model, cpu_inputs).program, config)
    assert found == expected
    plan = dcr.inspect(model, inputs)
    assert str(plan) == str(dcr.inspect(cpu_model, cpu_inputs))


def test_a_frozen_graph_is_recorded_as_a_cuda_graph() -> None:
    model, inputs = on_cuda("dit")
    (frozen,) = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        frozen(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        recorded = flat(frozen(**inputs))
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            inputs["hidden_states"].normal_()
            graph.replay()
            assert_near(recorded, frozen(**inputs))


# --------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"estimator": "two_bin"},
        {"train": "lora"},
        {"block_outputs": 0.5, "checkpointing": True},
        {"optimizer": "muon", "ratios": "errors"},
    ],
    ids=["default", "bf16", "two_bin", "lora", "block_outputs", "muon"],
)
def test_calibration_on_cuda_is_near_that_of_the_cpu(options: dict[str, Any]) -> None:
    config = settings(**options)
    losses = {}
    for device in ("cuda", "cpu"):
        model, inputs = on_cuda("dit") if device == "cuda" else models.tiny_dit()
        routed = dcr.route(model, inputs, config.routing)
        result = dcr.calibrate(routed, budget="60%", config=config)
        losses[device] = [step["loss"] for step in result.history]
        frozen = dcr.freeze(routed, result)
        with torch.no_grad():
            assert all(bool(o.isfinite().all()) for g in frozen for o in flat(g(**inputs)))
        assert {p.device.type for p in routed.parameters()} == {device}
    assert np.isfinite(losses["cuda"]).all()
    # the first step is the same but for rounding; later ones diverge as K and tokens differ
    first = 0.05 if options.get("precision") == "bf16" else 5e-3
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=first, abs=1e-6)
    assert losses["cuda"][-1] == pytest.approx(losses["cpu"][-1], rel=0.5, abs=1e-4)


def test_an_interrupted_calibration_on_cuda_goes_on(tmp_path: Path) -> None:
    model, inputs = on_cuda("dit")
    config = settings()
    whole = dcr.calibrate(
        dcr.route(model, inputs, config.routing), budget="60%", config=config
    )

    def stop(stage: str, done: int, count: int, figures: Any) -> None:
        if stage == "calibrate" and done == 3:
            raise KeyboardInterrupt

    call = {"budget": "60%", "config": config, "folder": tmp_path, "key": "k"}
    with pytest.raises(KeyboardInterrupt):
        dcr.calibrate(dcr.route(model, inputs, config.routing), progress=stop, **call)
    steps = list[int]()

    def note(stage: str, done: int, count: int, figures: Any) -> None:
        if stage == "calibrate":
            steps.append(done)

    found = dcr.calibrate(dcr.route(model, inputs, config.routing), progress=note, **call)
    assert 0 < len(steps) < 6
    # kernels with atomic sums may differ in the last digits from run to run
    expected = [step["loss"] for step in whole.history]
    assert [s["loss"] for s in found.history] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_users_own_data_may_lie_on_either_device(where: str) -> None:
    model, inputs = on_cuda("dit")
    config = settings(steps=2)
    batches = [
        {k: v.to(where) for k, v in at_timestep(inputs, value).items()}
        for value in (200.0, 400.0, 600.0, 800.0)
    ]
    routed = dcr.route(model, inputs, config.routing)
    result = dcr.calibrate(routed, batches, budget="60%", config=config)
    assert np.isfinite([step["loss"] for step in result.history]).all()


# --------------------------------------------------------------------------- export and runtime


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_artifact_of_a_cuda_model(tmp_path: Path, precision: Any) -> None:
    model, inputs = on_cuda("dit")
    frozen = two_buckets(dcr.route(model, inputs))
    states = sampling_states([g.program for g in frozen], (900.0, 100.0), None, 0)
    artifact = dcr.export(frozen, tmp_path / "out", precision=precision, states=states)
    runners = [artifact.load(provider="cuda"), artifact.load()]
    for value, graph in ((100.0, frozen[0]), (900.0, frozen[1])):
        call = at_timestep(inputs, value)
        with torch.no_grad(), full_float32():  # cuDNN's convolutions are TF32 by default
            (expected,) = flat(graph(**call))
        arrays = {name: tensor.cpu().numpy() for name, tensor in call.items()}
        for runner in runners:
            found, wanted = runner(**arrays), expected.cpu().numpy()
            if precision == "fp32":
                np.testing.assert_allclose(found, wanted, **CLOSE)
            assert np.linalg.norm(found - wanted) < HALF * np.linalg.norm(wanted)
    again = dcr.DiffusersTransformer.from_artifact(
        tmp_path / "out", backend="torch", model=model
    )
    with torch.no_grad():
        assert_near(
            again(**at_timestep(inputs, 900.0)), frozen[1](**at_timestep(inputs, 900.0))
        )


def test_runner_on_the_cuda_provider(tmp_path: Path) -> None:
    model, inputs = models.tiny_dit()
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    artifact = dcr.export(frozen, tmp_path / "out")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    cuda, cpu = artifact.load(provider="cuda"), artifact.load()
    np.testing.assert_allclose(cuda(**arrays), cpu(**arrays), rtol=1e-3, atol=1e-3)


def test_the_drop_in_transformer_takes_tensors_of_the_device(tmp_path: Path) -> None:
    model, inputs = models.tiny_dit()
    dcr.export(dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5), tmp_path / "out")
    expected = dcr.DiffusersTransformer.from_artifact(tmp_path / "out")(**inputs).sample
    found = dcr.DiffusersTransformer.from_artifact(tmp_path / "out", provider="cuda")
    moved = {k: v.cuda() for k, v in inputs.items()}
    sample = found(**moved).sample
    assert sample.is_cuda
    torch.testing.assert_close(sample.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_compile_from_a_cuda_model_to_the_report(tmp_path: Path) -> None:
    model, inputs = on_cuda("dit")
    config = settings(steps=2)
    artifact = dcr.compile(
        model, tmp_path / "out", example_inputs=inputs, budget="60%", config=config
    )
    report = json.loads((artifact.folder / "report/report.json").read_text())
    assert report["parity"]["routed_all_kept_bit_equal"] is True
    assert report["budget"]["reached"] <= 0.6


def test_torch_compile_with_inductor_compiles_once_per_bucket(tmp_path: Path) -> None:
    model, inputs = on_cuda("dit")
    frozen = two_buckets(dcr.route(model, inputs))
    dcr.export(frozen, tmp_path / "out")
    torch._dynamo.reset()
    counters.clear()
    if "diffcr" not in torch._dynamo.list_backends(exclude_tags=()):
        register_backend(diffcr, name="diffcr")
    compiled = torch.compile(
        model, backend="diffcr", fullgraph=True, options={"artifact": str(tmp_path / "out")}
    )
    with torch.no_grad():
        for value in (900.0, 700.0, 300.0, 100.0):
            call = at_timestep(inputs, value)
            assert_near(compiled(**call), frozen[int(value > EDGE)](**call))
    assert dict(counters["graph_break"]) == {}
    assert dict(counters["recompiles"]) == {}
    assert counters["stats"]["unique_graphs"] == 1  # Dynamo traces the dense model once
    torch._dynamo.reset()


def test_a_latency_table_of_torch_on_cuda() -> None:
    model, inputs = on_cuda("dit")
    config = RoutingConfig(multiple_of=32)
    routed = dcr.route(model, inputs, config).program
    table = measure_latency(
        routed, config, "dit", backend="torch", device="cuda", stability=0.5, most_rounds=7
    )
    assert table["dense_milliseconds"] > 0
    assert table["backend"]["device"] == "cuda"


# --------------------------------------------------------------------------- the CUDA API


@pytest.fixture
def cuda() -> Any:
    pytest.importorskip("cuda.bindings.runtime")
    from diffcr_compile.runtime.cuda_api import CudaPython

    return CudaPython()


def test_cuda_says_of_its_device_what_torch_says(cuda: Any) -> None:
    facts, properties = cuda.device_facts(), torch.cuda.get_device_properties(0)
    assert facts.name == properties.name
    assert facts.sm == 10 * properties.major + properties.minor
    assert facts.total_bytes == properties.total_memory
    assert facts.integrated == bool(properties.is_integrated)
    assert 0 < cuda.free_bytes() <= facts.total_bytes


def test_memory_goes_to_the_device_and_back(cuda: Any) -> None:
    array = np.arange(1 << 20, dtype=np.float32)
    stream, address = cuda.make_cuda_stream(), cuda.allocate(array.nbytes)
    try:
        assert address % 256 == 0
        cuda.upload(address, array, stream)
        back = np.empty_like(array)
        cuda.download(back, address, stream)
        cuda.synchronize(stream)
        np.testing.assert_array_equal(back, array)
    finally:
        cuda.free(address)
        cuda.destroy_cuda_stream(stream)


def test_recorded_work_runs_at_every_launch(cuda: Any) -> None:
    stream = cuda.make_cuda_stream()
    counter = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        counter.add_(1)  # the kernel is loaded before it is recorded
        cuda.synchronize(stream)
        cuda.begin_capture(stream)
        counter.add_(1)
        graph = cuda.end_capture(stream)
    cuda.synchronize(stream)
    assert counter.tolist() == [1.0] * 4  # recorded, not run
    for _ in range(3):
        cuda.launch(graph, stream)
    cuda.synchronize(stream)
    assert counter.tolist() == [4.0] * 4
    cuda.destroy_graph(graph)
    cuda.destroy_cuda_stream(stream)


def test_too_much_memory_is_a_resource_error(cuda: Any) -> None:
    from diffcr_compile.errors import ResourceError

    with pytest.raises(ResourceError, match="out of memory"):
        cuda.allocate(1 << 50)
    cuda.free(cuda.allocate(1 << 20))  # that error does not stay
