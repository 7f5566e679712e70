"""int8: which layers, the values they stand for, artifacts, and what is said without ModelOpt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile.engine_plan import plan_engines
from diffcr_compile.errors import AccuracyError, EnvironmentMissingError
from diffcr_compile.export import int8_ranges
from diffcr_compile.export.half import compute_in_half
from diffcr_compile.export.half_run import HalfRun
from diffcr_compile.export.int8 import (
    LEVELS,
    SMALLEST_SCALE,
    compute_in_int8,
    scale_of,
    token_linears,
)
from diffcr_compile.export.lint import lint
from diffcr_compile.export.onnx_model import exported_program
from diffcr_compile.export.precision import HalfSettings, half_graphs, step_of
from diffcr_compile.export.rtx_build import build_rtx
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.planning.targets import all_targets
from diffcr_compile.program import Program
from diffcr_compile.validate import validate_artifact
from tests.conftest import Case
from tests.test_open_kept_tokens import ROWS, frozen_programs
from tests.test_precision import states_of

aten = torch.ops.aten
MODELOPTS = int8_ranges._calibrator
LAYERS = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
TOKENS = {f"graph_module.blocks.{i}.{layer}.weight" for i in (0, 1) for layer in LAYERS}


class Largest:
    """Stands in for ModelOpt's MaxCalibrator, which CI does not install."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def collect(self, values: Tensor) -> None:
        largest = values.abs().amax()
        self.found = largest if self.found is None else torch.maximum(self.found, largest)

    def compute_amax(self) -> Tensor | None:
        return self.found


@pytest.fixture(scope="module")
def ranges() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_ranges, "_calibrator", lambda: Largest)
        yield


@pytest.fixture(scope="module")
def frozen(cases: Callable[..., Case]) -> list[Program]:
    return frozen_programs(cases("plain"), ROWS)


# ------------------------------------------------------------------------------ which layers


def test_linear_layers_of_tokens_become_int8_and_nothing_else(frozen: list[Program]) -> None:
    program = frozen[0]
    exported = exported_program(program)
    assert set(token_linears(exported, program).values()) == TOKENS
    largest = dict.fromkeys(TOKENS, 4.0)
    made = compute_in_int8(compute_in_half(exported, program), program, largest)
    types = {name: tensor.dtype for name, tensor in made.state_dict.items()}
    assert {name for name, dtype in types.items() if dtype == torch.int8} == TOKENS
    assert {dtype for name, dtype in types.items() if "_router" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "modulation" in name} == {torch.float16}
    assert {dtype for name, dtype in types.items() if "head" in name} == {torch.float16}
    assert {p.dtype for p in program.module.parameters()} == {torch.float32}


def test_a_block_that_stays_float32_is_not_put_into_int8(frozen: list[Program]) -> None:
    program = frozen[0]
    half = compute_in_half(exported_program(program), program, ["blocks.0"])
    made = compute_in_int8(half, program, dict.fromkeys(TOKENS, 4.0))
    narrow = {name for name, t in made.state_dict.items() if t.dtype == torch.int8}
    assert narrow == {name for name in TOKENS if "blocks.1" in name}


def test_scales_are_float16_numbers_and_never_vanish() -> None:
    scales = scale_of(torch.tensor([0.0, 1e-6, 1.0, 300.0]))
    assert torch.equal(scales, scales.half().float())
    assert scales.min() == SMALLEST_SCALE
    torch.testing.assert_close(
        scales[2:] * LEVELS, torch.tensor([1.0, 300.0]), rtol=5e-4, atol=0
    )


def test_a_layer_computes_with_the_values_that_its_levels_stand_for(
    frozen: list[Program],
) -> None:
    """One layer against a copy in float32, with the rounding of each step written out."""
    program = frozen[0]
    name = "graph_module.blocks.0.mlp.0.weight"
    made = compute_in_int8(
        compute_in_half(exported_program(program), program),
        program,
        dict.fromkeys(TOKENS, 4.0),
    )
    seen: dict[str, list[Tensor]] = {}

    class Watched(HalfRun):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.target is aten.linear.default and n in layers:
                args, _ = self.fetch_args_kwargs_from_env(n)
                seen[n.name] = [*args, result]
            return result

    layers = [
        n for n in made.graph.nodes if n.target is aten.linear.default and read(n) == "mlp_0"
    ]
    run = Watched(made)
    run.outputs(dict(program.example))
    x, weight, bias, result = seen[layers[0].name]
    wide = (
        program.module.get_parameter(name.removeprefix("graph_module."))
        .detach()
        .half()
        .float()
    )
    scales = scale_of(wide.abs().amax(dim=1))[:, None]
    torch.testing.assert_close(
        weight.float(), ((wide / scales).round() * scales), rtol=1e-3, atol=0
    )
    scale = scale_of(4.0)
    levels = x.float() / scale
    torch.testing.assert_close(levels, levels.round(), rtol=1e-3, atol=1e-3)
    assert levels.abs().max() <= LEVELS
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).half()
    assert torch.equal(result, expected)


def read(node: Any) -> str:
    """The layer of block 0 that a linear node is, by its module; "" for others."""
    path = list(node.meta["nn_module_stack"].values())[-1][0]
    return "mlp_0" if path.endswith("blocks.0.mlp.0") else ""


# -------------------------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def exported(
    ranges: None, frozen: list[Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("int8") / "out"
    graphs = [p.module for p in frozen]
    dcr.export(graphs, folder, precision="int8", states=states_of(frozen))
    return read_manifest(folder), folder


def test_the_manifest_says_how_far_int8_is(exported: tuple[Manifest, Path]) -> None:
    manifest, folder = exported
    assert manifest.precision["type"] == "int8"
    read = {f"graph_module.{name}" for name in manifest.precision["int8_inputs"]}
    assert read == TOKENS
    rounding = [row for row in manifest.parity["precision"] if row["step"] == step_of("int8")]
    assert [row["bucket"] for row in rounding] == [0, 1, 2]
    assert all(1e-4 < row["rel_l2"] <= 2e-2 and row["non_finite"] == 0 for row in rounding)
    # ONNX Runtime takes the same levels as the program, in the graphs of both engine modes
    strict = [*manifest.parity["precision"][3:], *manifest.parity["profiles"]]
    assert len(strict) == 6
    assert all(row["rel_l2"] <= 1e-2 for row in strict)
    assert all(row["passed"] for row in validate_artifact(folder))


def test_the_graphs_hold_int8_weights_once_and_pairs_around_each_product(
    exported: tuple[Manifest, Path],
) -> None:
    places = set()
    for path in sorted((exported[1] / "onnx").glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        ops = [node.op_type for node in model.graph.node]
        assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (8, 16)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
        pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        assert {types[node.output[0]] for node in pairs} == {TensorProto.FLOAT16}
        narrow = [
            t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and t.dims
        ]
        assert {t.name for t in narrow} == {n.removeprefix("graph_module.") for n in TOKENS}
        places.add(tuple((t.name, str(t.external_data)) for t in narrow))
    assert len(places) == 1  # the same bytes of one file in every graph


def test_no_target_refuses_int8_graphs(exported: tuple[Manifest, Path]) -> None:
    findings = lint(exported[1], all_targets())
    assert [f for f in findings if f.severity == "error"] == []


@pytest.mark.parametrize("capability", ["SM86", "SM120"])
def test_tensorrt_rtx_builds_int8_graphs_with_static_and_with_open_lengths(
    exported: tuple[Manifest, Path], capability: str
) -> None:
    assert_builds(*exported, capability)


def assert_builds(manifest: Manifest, folder: Path, capability: str) -> None:
    """A static graph, and the one whose lengths are open over all buckets."""
    pytest.importorskip("tensorrt_rtx")
    assert build_rtx(folder / manifest.buckets[0]["onnx"], capability).data
    (engine,) = plan_engines(manifest, "profiles", "spanning").engines
    assert build_rtx(folder / engine.onnx, capability, engine.bounds()).data


def test_int8_that_is_too_far_off_is_refused(ranges: None, frozen: list[Program]) -> None:
    golden = dict(frozen[0].example)
    with pytest.raises(AccuracyError, match="int8 differs from float32"):
        half_graphs(frozen, HalfSettings("int8", tolerance=1e-6), lambda _: golden)


# --------------------------------------------------------------------------------- ModelOpt


def test_without_modelopt_the_extra_is_named(
    frozen: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_ranges, "_calibrator", MODELOPTS)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(EnvironmentMissingError, match=r"diffcr-compile\[int8\]") as caught:
        dcr.export([p.module for p in frozen], tmp_path / "out", precision="int8")
    assert caught.value.code == "DCR-E013"
    assert not (tmp_path / "out/manifest.json").exists()


def test_modelopts_calibrator_finds_the_largest_magnitude() -> None:
    pytest.importorskip("modelopt", reason="200 MB with its solvers; run by hand")
    real, ours = MODELOPTS()(), Largest()
    for seed in range(3):
        values = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
        real.collect(values)
        ours.collect(values)
    assert float(real.compute_amax()) == float(ours.compute_amax())
