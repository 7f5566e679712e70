"""Facts about devices, against what the compiler itself writes."""

from __future__ import annotations

import onnx
import pytest

from diffcr_compile.errors import UsageError
from diffcr_compile.export.onnx_model import MAX_IR_VERSION, OPSET, onnx_from_program
from diffcr_compile.planning.targets import ROUTING_OPS, TARGETS, find_target

TENSORRT = ("orin-jp6", "thor-jp7", "rtx")


def test_every_target_reads_the_opset_and_ir_that_are_written() -> None:
    for target in TARGETS.values():
        assert target.max_opset is None or target.max_opset >= OPSET
        assert target.max_ir is None or target.max_ir >= MAX_IR_VERSION


@pytest.mark.parametrize("name", TENSORRT)
@pytest.mark.parametrize("model", ["dit", "pixart", "flux"])
def test_tensorrt_reads_every_op_of_a_routed_graph(cases, name: str, model: str) -> None:
    case = cases(model)
    column = {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}
    graph = onnx_from_program(case.frozen(column)).graph
    ops = {node.op_type for node in graph.node}
    assert {"TopK", "ScatterND"} <= ops  # it is a routed graph
    assert find_target(name).unknown_ops(ops) == ()


@pytest.mark.parametrize("name", TENSORRT)
def test_an_op_that_tensorrt_does_not_know_is_named(name: str) -> None:
    assert find_target(name).unknown_ops(["MatMul", "Unique", "Unique"]) == ("Unique",)
    assert find_target("ort-cpu").unknown_ops(["Unique"]) == ()


def test_importer_names_are_onnx_ops() -> None:
    """But for the seven that onnx-tensorrt has on top of the standard."""
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "Scatter", "Upsample"}
    for name in TENSORRT:
        ops = find_target(name).importer_ops
        assert ops is not None
        assert ops - standard <= own
        assert set(ROUTING_OPS) <= ops


@pytest.mark.parametrize("name", TENSORRT)
def test_top_k_is_limited_to_3840_on_every_tensorrt(name: str) -> None:
    assert find_target(name).max_topk == 3840
    assert "TopK K <= 3840" in find_target(name).limits()


def test_the_cpu_has_no_limits_of_tensorrt() -> None:
    target = find_target("ort-cpu")
    assert (target.max_topk, target.max_opset, target.sm) == (None, None, ())
    assert target.limits() == "types float32"


def test_compute_capabilities_of_the_jetsons() -> None:
    assert find_target("orin-jp6").sm == (87,)
    assert find_target("thor-jp7").sm == (110,)
    # neither can be built for without the device
    assert not {87, 110} & set(find_target("rtx").sm)


def test_troubles_are_found_by_op_whatever_the_overload() -> None:
    orin, thor = find_target("orin-jp6"), find_target("thor-jp7")
    ops = [
        "aten.cumsum.default",
        "aten.nonzero.default",
        "aten.add.Tensor",
        "aten._unique2.default",
    ]
    assert list(orin.troubles(ops)) == [ops[0], ops[1], ops[3]]
    assert list(thor.troubles(ops)) == [
        ops[1],
        ops[3],
    ]  # CumSum is a layer since TensorRT 10.8
    assert find_target("ort-cpu").troubles(ops) == {}


def test_unknown_targets_are_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="ort-cpu, orin-jp6, thor-jp7, rtx"):
        find_target("orin")
