"""float16: what is cast and what is not, rounding as in hardware, overflow found and cured, artifacts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.capture import capture
from diffcr_compile.errors import AccuracyError
from diffcr_compile.export.device.check import HALF_TOLERANCE as ENGINE_TOLERANCE
from diffcr_compile.export.device.check import tolerance_of
from diffcr_compile.export.half import NEVER, compute_in_half
from diffcr_compile.export.half_run import HalfRun, Ranges, WideRun
from diffcr_compile.export.onnx_model import exported_program
from diffcr_compile.export.precision import HalfSettings, half_graphs, step_of
from diffcr_compile.export.widened import widen
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.program import Program, run_flat
from diffcr_compile.runtime import load
from diffcr_compile.validate import validate_artifact
from tests import models
from tests.conftest import Case
from tests.test_open_kept_tokens import ROWS, frozen_programs

aten = torch.ops.aten


def kinds(exported: Any, target: object) -> set[torch.dtype]:
    """Types of what the nodes of one kind give."""
    nodes = [n for n in exported.graph.nodes if n.target is target]
    values = [n.meta["val"] for n in nodes]
    return {v.dtype for v in values if isinstance(v, Tensor)}


@pytest.fixture(scope="module")
def frozen(cases: Callable[..., Case]) -> list[Program]:
    return frozen_programs(cases("plain"), ROWS)


def states_of(frozen: list[Program]) -> list[dict[str, Tensor]]:
    """A state in each timestep bucket."""
    return [{**frozen[0].example, "t": torch.full((2,), t)} for t in (0.1, 0.5, 0.9)]


def typed(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    """The graph of a file, and the type of every value and constant in it."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return graph, types | {t.name: t.data_type for t in graph.initializer}


@pytest.fixture(scope="module")
def half(frozen: list[Program]) -> Any:
    return compute_in_half(exported_program(frozen[0]), frozen[0])


# ------------------------------------------------------------------------------- what is cast


def test_products_are_float16_and_what_grows_or_decides_is_not(half: Any) -> None:
    assert kinds(half, aten.matmul.default) == {torch.float16}  # of attention
    assert kinds(half, aten.softmax.int) == {torch.float32}
    for target in (
        aten.layer_norm.default,
        aten.gelu.default,
        aten.add.Tensor,
        aten.index_put.default,
    ):
        floats = {kind for kind in kinds(half, target) if kind.is_floating_point}
        assert floats == {torch.float32}, target  # positions are added up too
    linears = [n for n in half.graph.nodes if n.target is aten.linear.default]
    routers = [n for n in linears if "_router" in str(n.meta["nn_module_stack"])]
    assert {n.meta["val"].dtype for n in routers} == {torch.float32}
    others = {n.meta["val"].dtype for n in linears if n not in routers}
    assert (len(routers), others) == (2, {torch.float16})


def test_weights_of_products_are_stored_in_float16_and_the_model_keeps_its_own(
    half: Any, frozen: list[Program]
) -> None:
    types = {name: tensor.dtype for name, tensor in half.state_dict.items()}
    assert {t for n, t in types.items() if "attention" in n or "mlp" in n} == {torch.float16}
    assert {t for n, t in types.items() if "_router" in n} == {torch.float32}
    assert {p.dtype for p in frozen[0].module.parameters()} == {torch.float32}


def test_an_island_and_what_lies_outside_of_blocks_stay_float32(frozen: list[Program]) -> None:
    program = frozen[0]
    made = compute_in_half(exported_program(program), program, ["blocks.0", ""])
    types = {name: t.dtype for name, t in made.state_dict.items() if "_router" not in name}
    assert {t for n, t in types.items() if "blocks.1" in n} == {torch.float16}
    assert {t for n, t in types.items() if "blocks.1" not in n} == {torch.float32}


class Masked(nn.Module):
    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2) + 1


def test_a_mask_of_very_large_numbers_still_says_never(frozen: list[Program]) -> None:
    """finfo.min is minus infinity in float16, and a row of it would be NaN."""
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 3:] = torch.finfo(torch.float32).min
    wide = torch.export.export(Masked(), (q, mask))
    made = compute_in_half(wide, frozen[0])
    clamps = [n for n in made.graph.nodes if n.target is aten.clamp.default]
    assert [n.args[1] for n in clamps] == [NEVER]
    inputs = {"q": q, "mask": mask}
    found = HalfRun(made).outputs(inputs)[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, Masked()(q, mask), atol=4e-3, rtol=0)


# ------------------------------------------------------------------------------------ rounding


def test_the_run_rounds_as_torch_does_in_float16(frozen: list[Program]) -> None:
    """torch's own float16 kernels are the reference: they sum in float32 and round once, too."""
    mlp = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    made = compute_in_half(torch.export.export(mlp, (x,)), frozen[0])
    found = HalfRun(made).outputs({"x": x})[0]
    expected = copy.deepcopy(mlp).half()(x.half()).float()
    assert found.dtype == torch.float32
    # the order of summation may differ: one unit of float16 in a few values
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found == expected).float().mean() > 0.9
    assert torch.equal(found, found.half().float())  # every value is one of float16
    wide = WideRun(made).outputs({"x": x})[0]
    assert not torch.equal(wide, wide.half().float())


def test_each_block_s_range_is_that_of_its_products(frozen: list[Program]) -> None:
    program = frozen[0]
    recorder = Ranges(exported_program(program), program)
    outputs = recorder.outputs(dict(program.example))
    with torch.no_grad():
        expected = run_flat(program, program.example)
    torch.testing.assert_close(outputs, expected)
    assert set(recorder.found) == {"", "blocks.0", "blocks.1"}
    assert len(recorder.chosen) == 2
    largest = max(
        p.detach().abs().max() for n, p in program.module.named_parameters() if "blocks.1" in n
    )
    assert recorder.found["blocks.1"].largest >= float(largest)


# ------------------------------------------------------------------------------------ overflow


def overflowing() -> list[Program]:
    """The plain model, with values of block 1 beyond float16 that are scaled back in the block."""
    model, inputs = models.plain()
    attention = model.blocks[1].attention
    with torch.no_grad():
        scale_values(attention, 3e5)
    from diffcr_compile.legality import find_blocks

    findings = find_blocks(model, (), inputs)
    captured = capture(model, (), inputs, findings.blocks, findings.refused, findings.sample)
    routed = run_passes(captured, [InsertTokenRouters()])
    case = Case("overflow", model, inputs, findings, captured, routed)
    return frozen_programs(case, {"blocks.0": [18], "blocks.1": [18]})


def scale_values(attention: nn.Module, factor: float) -> None:
    """Values times `factor`, the projection after them by it: the same function in float32."""
    qkv, out = attention.qkv, attention.out
    rows = slice(2 * qkv.out_features // 3, None)
    qkv.weight[rows] *= factor
    if qkv.bias is not None:
        qkv.bias[rows] *= factor
    out.weight /= factor


@pytest.fixture(scope="module")
def planted() -> list[Program]:
    return overflowing()


def test_a_planted_overflow_is_found_named_and_cured_by_a_float32_island(
    planted: list[Program],
) -> None:
    golden = dict(planted[0].example)
    with pytest.raises(AccuracyError, match=r"values NaN or infinite") as caught:
        half_graphs(planted, HalfSettings(islands=()), lambda _: golden)
    assert "blocks.1 up to" in str(caught.value)
    cured = half_graphs(planted, HalfSettings(), lambda _: golden)
    assert cured.islands == ("blocks.1",)
    assert cured.ranges["blocks.1"].largest > 65504 > cured.ranges["blocks.0"].largest
    assert all(row.passed and row.non_finite == 0 for row in cured.rows)
    assert cured.to_json()["float32_islands"] == ["blocks.1"]


# ------------------------------------------------------------------------------------ artifacts


@pytest.fixture(scope="module")
def exported(
    frozen: list[Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("half") / "out"
    dcr.export([p.module for p in frozen], folder, precision="fp16", states=states_of(frozen))
    return read_manifest(folder), folder


def test_the_manifest_says_what_was_tried_and_how_far_float16_is(
    exported: tuple[Manifest, Path],
) -> None:
    manifest, folder = exported
    assert manifest.precision["type"] == "fp16"
    assert manifest.precision["float32_islands"] == []
    assert manifest.precision["states"] == 6  # one given and one golden per bucket
    assert set(manifest.precision["ranges"]) == {"", "blocks.0", "blocks.1"}
    rounding = [row for row in manifest.parity["precision"] if row["step"] == step_of("fp16")]
    assert [row["bucket"] for row in rounding] == [0, 1, 2]
    assert all(0 < row["rel_l2"] <= 5e-3 and row["non_finite"] == 0 for row in rounding)
    # the ONNX files say the same as the programs, but for the last digits of float32
    strict = [*manifest.parity["precision"][3:], *manifest.parity["profiles"]]
    assert len(strict) == 6
    assert all(row["max_abs"] <= 1e-4 for row in strict)
    assert not (folder / "widened").exists()
    assert tolerance_of(manifest) >= ENGINE_TOLERANCE
    assert all(row["passed"] for row in validate_artifact(folder))


def test_types_stand_in_the_onnx_files_and_inputs_stay_as_they_were(
    exported: tuple[Manifest, Path],
) -> None:
    for path in sorted((exported[1] / "onnx").glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        graph, types = typed(path)
        scores = {n.input[0] for n in graph.node if n.op_type == "TopK"}
        assert {types[name] for name in scores} == {TensorProto.FLOAT}
        assert {types[v.name] for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
        norms = [n for n in graph.node if n.op_type == "LayerNormalization"]
        assert {types[n.output[0]] for n in norms} == {TensorProto.FLOAT}
        products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]
        read = [{types[name] for name in node.input} for node in products]
        assert all(len(kinds) == 1 for kinds in read)  # strong typing: no product of two types
        # all but the routers, which stand before the TopK of each block
        assert read.count({TensorProto.FLOAT}) == len(scores)
        assert read.count({TensorProto.FLOAT16}) > 5 * len(scores)


def test_the_runtime_takes_and_gives_float32(
    exported: tuple[Manifest, Path], frozen: list[Program]
) -> None:
    inputs = {name: tensor.numpy() for name, tensor in frozen[0].example.items()}
    inputs["t"] = np.full(2, 0.2, np.float32)
    found = load(exported[1])(**inputs)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_widening_leaves_no_float16(exported: tuple[Manifest, Path]) -> None:
    model = onnx.load(exported[1] / "onnx/bucket_00.onnx")
    assert widen(model) > 10
    assert TensorProto.FLOAT16 not in {t.data_type for t in model.graph.initializer}
    assert widen(model) == 0
