"""Products in bfloat16: what is cast, rounding as in hardware, artifacts that no CPU runs as they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.commands.outcome import print_report
from diffcr_compile.config import CompileConfig
from diffcr_compile.errors import AccuracyError, EnvironmentMissingError, UnsupportedModelError
from diffcr_compile.export.bisect import bisect_onnx
from diffcr_compile.export.block_values import BLOCK_VALUES
from diffcr_compile.export.checks import ROUNDED_STEP
from diffcr_compile.export.half import compute_in_half
from diffcr_compile.export.half_run import HalfRun, WideRun
from diffcr_compile.export.lint import lint
from diffcr_compile.export.onnx_model import check_standard
from diffcr_compile.export.precision import TOLERANCES, HalfSettings, half_graphs, step_of
from diffcr_compile.export.widened import widen
from diffcr_compile.manifest import Manifest, hash_files, read_manifest, write_manifest
from diffcr_compile.planning.targets import all_targets
from diffcr_compile.program import Program
from diffcr_compile.runtime import load
from diffcr_compile.validate import validate_artifact
from tests import models
from tests.conftest import Case
from tests.test_int8 import assert_builds
from tests.test_open_kept_tokens import ROWS, frozen_programs
from tests.test_precision import kinds, overflowing, states_of, typed

aten = torch.ops.aten


@pytest.fixture(scope="module")
def frozen(cases: Callable[..., Case]) -> list[Program]:
    return frozen_programs(cases("plain"), ROWS)


# ------------------------------------------------------------------------------- what is cast


class Patches(nn.Module):
    """A convolution, an einsum of two operands and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.linear = nn.Linear(8, 8)

    def forward(self, image: Tensor, mixing: Tensor) -> Tensor:
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        return torch.einsum("bnc,cd->bnd", self.linear(tokens), mixing)


def test_convolutions_and_einsum_stay_float32_because_onnx_has_them_in_no_bfloat16(
    frozen: list[Program],
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 1, 8, 8, generator=generator),
        torch.randn(8, 8, generator=generator),
    )
    exported = torch.export.export(Patches().eval(), inputs)
    made = compute_in_half(exported, frozen[0], precision="bf16")
    assert kinds(made, aten.conv2d.default) == {torch.float32}
    assert kinds(made, aten.einsum.default) == {torch.float32}
    assert kinds(made, aten.linear.default) == {torch.bfloat16}
    narrow = {name for name, t in made.state_dict.items() if t.dtype == torch.bfloat16}
    assert narrow == {"linear.weight", "linear.bias"}
    for op in ("Conv", "Einsum"):  # the reason, as the standard has it
        schema = onnx.defs.get_schema(op, 20)
        assert "tensor(bfloat16)" not in schema.inputs[0].types


def test_the_run_rounds_as_torch_does_in_bfloat16(frozen: list[Program]) -> None:
    """torch's own bfloat16 kernels are the reference: they sum in float32 and round once, too."""
    mlp = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    made = compute_in_half(torch.export.export(mlp, (x,)), frozen[0], precision="bf16")
    found = HalfRun(made, "bf16").outputs({"x": x})[0]
    expected = copy.deepcopy(mlp).bfloat16()(x.bfloat16()).float()
    # the order of summation may differ: one unit of bfloat16 (2**-8) in a few values
    torch.testing.assert_close(found, expected, atol=8e-3, rtol=8e-3)
    assert (found == expected).float().mean() > 0.9
    assert torch.equal(found, found.bfloat16().float())  # every value is one of bfloat16
    wide = WideRun(made, "bf16").outputs({"x": x})[0]
    assert not torch.equal(wide, wide.bfloat16().float())


def test_values_beyond_float16_need_no_island() -> None:
    planted = overflowing()
    golden = dict(planted[0].example)
    made = half_graphs(planted, HalfSettings("bf16"), lambda _: golden)
    assert made.ranges["blocks.1"].largest > 65504
    assert made.islands == ()
    assert made.to_json()["limit"] is None
    assert all(row.passed and row.non_finite == 0 for row in made.rows)


def test_bfloat16_that_is_too_far_off_is_refused_without_a_word_on_float16(
    frozen: list[Program],
) -> None:
    golden = dict(frozen[0].example)
    with pytest.raises(AccuracyError, match="bfloat16 differs from float32") as caught:
        half_graphs(frozen, HalfSettings("bf16", tolerance=1e-6), lambda _: golden)
    assert "float16 ends" not in str(caught.value)


# ------------------------------------------------------------------------------------ artifacts


@pytest.fixture(scope="module")
def exported(
    frozen: list[Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("bf16") / "out"
    dcr.export([p.module for p in frozen], folder, precision="bf16", states=states_of(frozen))
    return read_manifest(folder), folder


def test_the_manifest_says_how_far_bfloat16_is(exported: tuple[Manifest, Path]) -> None:
    manifest, folder = exported
    assert manifest.precision["type"] == "bf16"
    rounding = [row for row in manifest.parity["precision"] if row["step"] == step_of("bf16")]
    assert [row["bucket"] for row in rounding] == [0, 1, 2]
    # 8 bits: far from float32's own noise, and within the gate
    assert all(2e-4 < row["rel_l2"] <= TOLERANCES["bf16"] for row in rounding)
    alone = manifest.parity["buckets"]
    assert {row["step"] for row in alone} == {ROUNDED_STEP}
    assert all(row["rel_l2"] > 2e-4 and row["non_finite"] == 0 for row in alone)
    # the ONNX files say the same as the programs, but for the last digits of float32
    strict = [*manifest.parity["precision"][3:], *manifest.parity["profiles"]]
    assert len(strict) == 6
    assert all(row["max_abs"] <= 1e-4 for row in strict)
    assert not (folder / "widened").exists()


def test_types_stand_in_the_onnx_files(exported: tuple[Manifest, Path]) -> None:
    for path in sorted((exported[1] / "onnx").glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        graph, types = typed(path)
        assert {types[v.name] for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
        assert TensorProto.FLOAT16 not in types.values()
        products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]
        read = [{types[name] for name in node.input} for node in products]
        scores = [n for n in graph.node if n.op_type == "TopK"]
        assert read.count({TensorProto.FLOAT}) == len(scores)  # the routers
        assert read.count({TensorProto.BFLOAT16}) == len(products) - len(scores) > 0


def test_every_op_must_have_bfloat16_in_the_standard() -> None:
    half = onnx.helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1, 1, 4, 4])
    out = onnx.helper.make_tensor_value_info("y", TensorProto.BFLOAT16, None)

    def model(op: str) -> onnx.ModelProto:
        inputs = ["x", "x"] if op == "Conv" else ["x"]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(op, inputs, ["y"])], "g", [half], [out]
        )
        return onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
        )

    check_standard(model("Softmax"), bfloat16=True)
    for op, allowed in (("Conv", True), ("Softmax", False)):
        with pytest.raises(UnsupportedModelError, match=rf"\['{op}'\] compute in bfloat16"):
            check_standard(model(op), bfloat16=allowed)


def test_a_cpu_validates_what_it_cannot_run(exported: tuple[Manifest, Path]) -> None:
    manifest, folder = exported
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # else this special case can go
        onnxruntime.InferenceSession(
            str(folder / manifest.buckets[0]["onnx"]), providers=["CPUExecutionProvider"]
        )
    with pytest.raises(EnvironmentMissingError, match="no kernels on the CPU") as caught:
        load(folder)
    assert (caught.value.code, caught.value.exit_code) == ("DCR-E014", 4)
    rows = validate_artifact(folder)
    assert len(rows) == 6
    assert all(row["passed"] and row["rel_l2"] > 0 for row in rows)


def test_validation_sees_other_golden_outputs_and_a_bisection_another_block(
    exported: tuple[Manifest, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported[1], folder)
    assert bisect_onnx(folder, read_manifest(folder), 0, 1e-4) is None
    marks = json.loads((folder / BLOCK_VALUES).read_text())
    row = marks["onnx/bucket_00.onnx"][-1]
    row["norm"] *= 1.5
    (folder / BLOCK_VALUES).write_text(json.dumps(marks))
    path = folder / exported[0].buckets[0]["golden"]
    golden = {name: array.copy() for name, array in load_file(path).items()}
    golden["output.output"] *= 1.5
    save_file(golden, path)
    manifest = read_manifest(folder)
    write_manifest(folder, _with_files(manifest, folder))
    with pytest.raises(AccuracyError, match=f"first block that is off is '{row['block']}'"):
        validate_artifact(folder, bisect=True)


def _with_files(manifest: Manifest, folder: Path) -> Manifest:
    return dataclasses.replace(manifest, files=hash_files(folder))


def test_widening_leaves_no_bfloat16(exported: tuple[Manifest, Path]) -> None:
    model = onnx.load(exported[1] / "onnx/bucket_00.onnx")
    assert widen(model) == 0  # there is no float16
    assert widen(model, "bf16") > 10
    assert TensorProto.BFLOAT16 not in {t.data_type for t in model.graph.initializer}
    assert widen(model, "bf16") == 0


# -------------------------------------------------------------------------------------- targets


def test_every_target_with_bfloat16_takes_the_graphs_and_onnxruntime_s_cpu_does_not(
    exported: tuple[Manifest, Path],
) -> None:
    refusing = {f.target for f in lint(exported[1], all_targets()) if f.severity == "error"}
    assert refusing == {t.name for t in all_targets() if "bfloat16" not in t.dtypes}
    assert refusing == {"onnxruntime-cpu"}


@pytest.mark.parametrize("capability", ["SM86", "SM120"])
def test_tensorrt_rtx_builds_static_graphs_and_open_lengths(
    exported: tuple[Manifest, Path], capability: str
) -> None:
    assert_builds(*exported, capability)


# ------------------------------------------------------------------------------------- pipeline


def test_a_compilation_says_what_it_could_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = models.plain()
    config = CompileConfig.model_validate(
        {
            "routing": {"timestep_high": 1.0, "buckets": 2},
            "rollouts": {"trajectories": 2, "steps": 2, "batch": 2},
            "calibration": {"steps": 2, "batch": 2},
            "export": {"precision": "bf16"},
        }
    )

    def evaluate(*_: Any) -> dict[str, float]:
        raise AssertionError("nothing here runs the graphs")

    made = dcr.compile(
        model,
        tmp_path / "out",
        example_inputs=inputs,
        budget="70%",
        config=config,
        evaluate=evaluate,
    )
    report = made.report
    assert report is not None
    assert report["speedup"]["onnxruntime_cpu_loop"] is None
    assert (report["drift"], report["quality"]) == (None, None)
    assert any("no bfloat16 kernels" in warning for warning in report["warnings"])
    assert all(check["name"] != "speed-up of the sampling loop" for check in report["checks"])
    (parity,) = [c for c in report["checks"] if c["name"] == "parity of every step"]
    # of half precision a relative error is judged; the largest difference of a swapped token says nothing
    assert parity["found"].startswith("relative L2")
    print_report(report, tmp_path / "out", 1.0)
    assert "warning: Speed, drift and quality were not measured" in capsys.readouterr().err
    page = (tmp_path / "out/report/report.html").read_text(encoding="utf-8")
    assert "not measured" in page
    assert "no bfloat16 kernels" in page
    assert np.isfinite(report["parity"]["onnx_rel_l2"])
