"""The linter: what the compiler writes suits every target, and a violation of each rule is caught and named."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import diffcr_compile as dcr
from diffcr_compile import cli
from diffcr_compile.config import make_config
from diffcr_compile.errors import ArtifactError, TargetError, UsageError
from diffcr_compile.export.lint import Finding, lint, lint_file, over_files, refuse
from diffcr_compile.export.onnx_facts import read_facts
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.export.weights import write_shared_weights
from diffcr_compile.manifest import hash_files, read_manifest, write_manifest
from diffcr_compile.planning.targets import Target, all_targets, find_target
from tests import device_artifact, models
from tests.conftest import Case

F32, F16, BF16, F64, F8, I64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.INT64,
    TensorProto.BOOL,
)
Shape = Sequence[int | str]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A graph of one node and the finding that it must give.

    Attributes:
        op: the operator; its inputs are ``x``, then the names in `constants` and `runtime`.
        target: where it is refused.
        x: type and shape of the first input.
        y: type and shape of the first output.
        constants: values of further inputs that are initializers.
        runtime: int64 inputs of the graph of this length, which are no constants.
        outputs: how many outputs the node has.
        attributes: of the node.
        header: opset, IR version, domain.
    """

    op: str
    target: str = "jetson-orin-nx"
    x: tuple[int, Shape] = (F32, (2, 8))
    y: tuple[int, Shape] = (F32, (2, 8))
    constants: tuple[Any, ...] = ()
    runtime: tuple[int, ...] = ()
    outputs: int = 1
    attributes: tuple[tuple[str, Any], ...] = ()
    header: tuple[int, int, str] = (20, 10, "")

    def write(self, path: Path) -> Path:
        inputs = [helper.make_tensor_value_info("x", *self.x)]
        inputs += [
            helper.make_tensor_value_info(f"r{i}", I64, [n])
            for i, n in enumerate(self.runtime)
        ]
        weights = [
            numpy_helper.from_array(np.array(v), f"c{i}") for i, v in enumerate(self.constants)
        ]
        opset, ir, domain = self.header
        names = ["x", *(w.name for w in weights), *(v.name for v in inputs[1:])]
        made = ["y", *(f"y{i}" for i in range(1, self.outputs))]
        node = helper.make_node(self.op, names, made, name="block.3/node", domain=domain)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in self.attributes)
        output = helper.make_tensor_value_info("y", *self.y)
        graph = helper.make_graph([node], "planted", inputs, [output], weights)
        opsets = [
            helper.make_opsetid("", opset),
            *([helper.make_opsetid(domain, 1)] if domain else []),
        ]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), path)
        return path


INDEX, UPDATE = np.zeros((2, 1), np.int64), np.ones((2, 8), np.float32)
PLANTED: dict[str, Planted] = {
    "opset": Planted("Relu", header=(21, 10, "")),
    "ir": Planted("Relu", header=(20, 11, "")),
    "domain": Planted("FusedMatMul", header=(20, 10, "com.microsoft")),
    "operator": Planted("BitwiseNot", x=(I64, (2, 8)), y=(I64, (2, 8))),
    "type": Planted("Sin", x=(I64, (2, 8)), y=(I64, (2, 8))),
    "dtype": Planted("Relu", x=(F8, (2, 8)), y=(F8, (2, 8))),
    "topk": Planted("TopK", x=(F32, (2, 9000)), y=(F32, (2, 3841)), constants=([3841],), outputs=2),
    "rank": Planted("Relu", x=(F32, [1] * 9), y=(F32, [1] * 9)),
    "nonzero": Planted("NonZero", y=(I64, (2, "n"))),
    "nonzero-rtx": Planted("NonZero", "rtx", y=(I64, (2, "n"))),
    "unique": Planted("Unique", y=(F32, ("n",))),
    "compress": Planted("Compress", constants=([True],), y=(F32, ("n",))),
    "bitshift": Planted("BitShift", attributes=(("direction", "LEFT"),)),
    "scatternd-reduction": Planted(
        "ScatterND", constants=(INDEX, UPDATE), attributes=(("reduction", "none"),)
    ),
    "scatternd-reduction-10.9": Planted(
        "ScatterND", "rtx", constants=(INDEX, UPDATE), attributes=(("reduction", "add"),)
    ),
    "scatterelements-reduction": Planted(
        "ScatterElements",
        constants=(np.zeros((2, 8), np.int64), UPDATE),
        attributes=(("reduction", "add"),),
    ),
    "scatterelements-reduction-rtx": Planted(
        "ScatterElements",
        "rtx",
        constants=(np.zeros((2, 8), np.int64), UPDATE),
        attributes=(("reduction", "mul"),),
    ),
    "cumsum-loop": Planted("CumSum", constants=(1,)),
    "topk-bfloat16": Planted("TopK", x=(BF16, (2, 8)), y=(BF16, (2, 3)), constants=([3],), outputs=2),
    "topk-unsorted": Planted(
        "TopK", constants=([3],), y=(F32, (2, 3)), outputs=2, attributes=(("sorted", 0),)
    ),
    "pad-axes": Planted(
        "Pad", constants=([0, 1], np.float32(0)), runtime=(1,), y=(F32, (2, 9))
    ),
    "squeeze-axes": Planted("Squeeze", x=(F32, (1, 8)), y=(F32, (8,)), runtime=(1,)),
    "unsqueeze-axes": Planted("Unsqueeze", y=(F32, (1, 2, 8)), runtime=(1,)),
    "reduce-axes": Planted("ReduceSum", y=(F32, (2, 1)), runtime=(1,)),
    "onehot-depth": Planted("OneHot", x=(I64, (2,)), y=(F32, (2, 4)), runtime=(1,)),
    "layernorm-outputs": Planted("LayerNormalization", constants=(UPDATE[0],), outputs=2),
    "maxpool-indices": Planted(
        "MaxPool", x=(F32, (1, 2, 8)), y=(F32, (1, 2, 8)), outputs=2, attributes=(("kernel_shape", [1]),)
    ),
    "attention-float32": Planted(
        "Attention",
        "rtx",
        x=(F32, (1, 2, 4, 8)),
        y=(F32, (1, 2, 4, 8)),
        constants=(np.ones((1, 2, 4, 8), np.float32),) * 2,
        header=(23, 11, ""),
    ),
    "where-bool": Planted(
        "Where", "ort-cpu", x=(BOOL, (2,)), y=(BOOL, (2,)), constants=([True, False], [True, True])
    ),
}  # fmt: skip
# the same operators, spelt as the target takes them
HARMLESS = [
    Planted("ScatterND", constants=(INDEX, UPDATE)),
    Planted(
        "ScatterND", "rtx", constants=(INDEX, UPDATE), attributes=(("reduction", "none"),)
    ),
    Planted(
        "ScatterElements",
        constants=(np.zeros((2, 8), np.int64), UPDATE),
        attributes=(("reduction", "none"),),
    ),
    Planted("CumSum", "jetson-thor@jp7.1", constants=(1,)),
    Planted("TopK", constants=([3],), y=(F32, (2, 3)), outputs=2, attributes=(("sorted", 1),)),
    Planted("TopK", x=(F32, (2, 9000)), y=(F32, (2, 3840)), constants=([3840],), outputs=2),
    Planted("Squeeze", x=(F32, (1, 8)), y=(F32, (8,)), constants=([0],)),
    Planted("Squeeze", "rtx", x=(F32, (1, 8)), y=(F32, (8,)), runtime=(1,)),
    Planted("LayerNormalization", constants=(UPDATE[0],)),
    Planted("Where", constants=(UPDATE, UPDATE), x=(BOOL, (2, 8))),
    Planted("Relu", x=(BF16, (2, 8)), y=(BF16, (2, 8))),
    Planted("Relu", "onnxruntime-cuda", header=(21, 10, "")),
    Planted("Unique", "ort-cpu", y=(F32, ("n",))),
]


def errors_of(path: Path, *targets: Target) -> list[Finding]:
    return [f for f in lint(path, targets) if f.severity == "error"]


@pytest.mark.parametrize("rule", PLANTED)
def test_a_violation_of_each_rule_is_caught_and_named(rule: str, tmp_path: Path) -> None:
    planted = PLANTED[rule]
    found = lint(planted.write(tmp_path / "planted.onnx"), [find_target(planted.target)])
    if rule != "type":  # the one rule that only warns
        found = [finding for finding in found if finding.severity == "error"]
    assert rule in {finding.rule for finding in found}, found
    finding = next(finding for finding in found if finding.rule == rule)
    expected = {"opset": "graph", "ir": "graph"}.get(rule, planted.op)
    if rule != "dtype":  # the type is the input's as well
        assert (finding.operator, finding.count) == (expected, 1)
        # nothing but the planted rule, where one fact does not break two
        assert {f.rule for f in found} <= {rule, "dtype", "type"}
    if expected != "graph" and rule != "dtype":
        assert finding.where == "block.3"
    if rule == "type":
        assert finding.severity == "warning"
        return
    with pytest.raises(TargetError, match=rf"\({rule}\)"):
        refuse(found)


def test_every_rule_of_every_target_has_a_planted_violation() -> None:
    rules = {spelling.id for target in all_targets() for spelling in target.forbidden}
    assert rules <= set(PLANTED)


@pytest.mark.parametrize("number", range(len(HARMLESS)))
def test_what_the_target_takes_passes(number: int, tmp_path: Path) -> None:
    planted = HARMLESS[number]
    path = planted.write(tmp_path / "harmless.onnx")
    assert errors_of(path, find_target(planted.target)) == []


def test_weights_beyond_the_memory_of_the_device_are_refused_without_reading_them(
    tmp_path: Path,
) -> None:
    weight = TensorProto(name="w", data_type=F16, data_location=TensorProto.EXTERNAL)
    weight.dims.extend([70_000, 70_000])  # 9.8 GB
    weight.external_data.add(key="location", value="not_there.bin")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    value = helper.make_tensor_value_info("x", F16, [1, 70_000])
    out = helper.make_tensor_value_info("y", F16, [1, 70_000])
    graph = helper.make_graph([node], "large", [value], [out], [weight])
    opset = [helper.make_opsetid("", 20)]
    path = tmp_path / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    nano, orin = find_target("jetson-orin-nano@jp6.2"), find_target("jetson-agx-orin@jp6.2")
    (finding,) = errors_of(path, nano)
    assert (finding.rule, finding.operator) == ("memory", "weights")
    assert "9.8 GB of weights, the device has 8 GB for all" in finding.reason
    assert errors_of(path, orin) == []


def test_known_bugs_and_types_computed_in_less_are_warnings(tmp_path: Path) -> None:
    dynamic = Planted("Relu", x=(F32, ("n", 8)), y=(F32, ("n", 8))).write(tmp_path / "d.onnx")
    found = lint(
        dynamic, [find_target("jetson-orin-nx"), find_target("jetson-agx-orin@jp7.2")]
    )
    assert {(f.target, f.rule, f.severity) for f in found} == {
        ("jetson-orin-nx", "known-bug:dynamic-shapes-10.3", "warning"),
        ("jetson-orin-nx", "known-bug:several-profiles-before-10.8", "warning"),
    }
    assert "NVIDIA/TensorRT#4419" in found[0].reason
    refuse(found)  # does not raise
    half = Planted("Relu", x=(F16, (2, 8)), y=(F16, (2, 8))).write(tmp_path / "h.onnx")
    (thor,) = lint(half, [find_target("jetson-thor@jp7.1")])
    assert thor.rule == "known-bug:thor-float16-10.13"
    assert lint(half, [find_target("jetson-orin-nx")]) == []
    double = Planted("Relu", x=(F64, (2, 8)), y=(F64, (2, 8))).write(tmp_path / "f64.onnx")
    assert {(f.rule, f.severity) for f in lint(double, [find_target("rtx")])} == {
        ("dtype", "warning")
    }
    large = Planted("Expand", x=(F32, (1,)), y=(F32, (2**16, 2**16)), constants=([2**16] * 2,))
    rules = {
        f.rule for f in lint(large.write(tmp_path / "l.onnx"), [find_target("datacenter")])
    }
    assert "known-bug:large-tensors" in rules


def test_a_k_that_is_known_at_run_time_only_is_a_warning(tmp_path: Path) -> None:
    planted = Planted("TopK", x=(F32, (2, 9000)), y=(F32, (2, "k")), runtime=(1,), outputs=2)
    found = lint(planted.write(tmp_path / "k.onnx"), [find_target("rtx")])
    assert [(f.rule, f.severity) for f in found] == [("topk", "warning")]


def test_graphs_inside_a_graph_are_looked_at(tmp_path: Path) -> None:
    inner = [
        helper.make_graph(
            [helper.make_node("NonZero", ["x"], [f"{name}_out"], name=f"{name}/nz")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", I64, [2, None])],
        )
        for name in ("then", "else")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[1])
    inputs = [
        helper.make_tensor_value_info("c", BOOL, []),
        helper.make_tensor_value_info("x", F32, [2, 8]),
    ]
    outputs = [helper.make_tensor_value_info("y", I64, [2, None])]
    graph = helper.make_graph([node], "outer", inputs, outputs)
    path = tmp_path / "if.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        path,
    )
    (finding,) = errors_of(path, find_target("jetson-orin-nx"))
    assert (finding.rule, finding.count, finding.blocks) == (
        "nonzero",
        2,
        {"then": 1, "else": 1},
    )


# ---------------------------------------------------------------------- what the compiler writes


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint") / "out"
    routed = dcr.route(*models.tiny_dit())
    dcr.export(
        dcr.freeze(routed, keep_ratio=0.5), folder, target=[t.name for t in all_targets()]
    )
    return folder


def test_the_graphs_of_a_small_dit_suit_every_target(out: Path) -> None:
    assert lint(out, all_targets()) == []


def test_the_weights_are_not_needed(out: Path, tmp_path: Path) -> None:
    graph = tmp_path / "bucket_00.onnx"
    graph.write_bytes((out / "onnx/bucket_00.onnx").read_bytes())
    assert lint_file(graph, all_targets()) == []
    facts = read_facts(graph)
    # what lies in the weights file, and some bytes that stay in the graph
    weights = (out / "onnx/weights.bin").stat().st_size
    assert weights * 0.95 < facts.weight_bytes < weights * 1.05


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_lowered_graphs_have_no_attention_op_no_complex_number_and_no_error(
    name: str, cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases(name)
    column = {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}
    write_shared_weights({"graph.onnx": onnx_from_program(case.frozen(column))}, tmp_path)
    found = lint(tmp_path / "graph.onnx", all_targets())
    # rotary angles in float64 stay in the graph where positions are an input
    assert {(f.rule, f.severity) for f in found} <= (
        {("dtype", "warning")} if name == "flux" else set()
    )
    facts = read_facts(tmp_path / "graph.onnx")
    assert {"MatMul", "Softmax"} <= {node.proto.op_type for node in facts.nodes}
    assert "Attention" not in {node.proto.op_type for node in facts.nodes}
    kinds = {kind for node in facts.nodes for kind in node.output_types}
    assert not {"complex64", "complex128", None} & kinds


def test_findings_name_the_block(out: Path) -> None:
    small = find_target("rtx").model_copy(update={"max_topk": 31, "operators": None})
    found = lint(out, [small])
    blocks = list(read_manifest(out).schedule)
    assert [(f.file, f.rule, f.operator, f.count) for f in found] == [
        ("onnx/bucket_00.onnx", "topk", "TopK", 3)
    ]
    assert dict(found[0].blocks) == dict.fromkeys(blocks, 1)
    assert found[0].where == ", ".join(blocks)
    (twice,) = over_files([found[0], dataclasses.replace(found[0], file="other.onnx")])
    assert (twice.count, twice.file) == (6, "")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither an ONNX file nor the folder of an artifact"):
        lint(tmp_path, all_targets())
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"broken\.onnx is no ONNX file"):
        lint(tmp_path / "broken.onnx", all_targets())
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match="it has no graph"):
        lint(tmp_path / "empty.onnx", all_targets())


# ---------------------------------------------------------------------- the command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_cli_passes_an_artifact_for_all_targets(
    out: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, "lint", str(out)) == 0
    printed = capsys.readouterr().out
    assert all(f"{target.name}: ok" in printed for target in all_targets())
    assert run(monkeypatch, "lint", str(out), "--target", "rtx", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"targets": ["rtx"], "findings": []}


def test_cli_leaves_with_3_and_shows_operator_count_reason_and_block(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    path = str(PLANTED["nonzero"].write(tmp_path / "planted.onnx"))
    assert (
        run(monkeypatch, "lint", path, "--target", "jetson-orin-nx", "--target", "ort-cpu")
        == 3
    )
    shown = capsys.readouterr()
    words = " ".join(shown.out.split())
    for word in (
        "Operator",
        "Count",
        "Reason",
        "Block",
        "NonZero",
        "block.3",
        "jetson-orin-nx: refused",
    ):
        assert word in words
    assert "onnxruntime-cpu: ok" in words
    assert "does not suit jetson-orin-nx: nonzero" in " ".join(shown.err.split())
    assert run(monkeypatch, "lint", path, "--json") == 3
    (first, *_) = json.loads(capsys.readouterr().out)["findings"]
    assert (first["rule"], first["operator"], first["blocks"]) == (
        "nonzero",
        "NonZero",
        {"block.3": 1},
    )


def test_cli_takes_targets_of_the_user_and_refuses_unknown_ones(
    out: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: tiny\ndevice: d\nengine: tensorrt\nversion: '10.3'\nimporter: tensorrt-10.3\n"
        "unified_memory: true\nmemory_bytes: 10\ndtypes: [float32]\n"
    )
    assert (
        run(monkeypatch, "lint", str(out), "--target", "tiny", "--targets", str(tmp_path)) == 3
    )
    assert "GB of weights" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, "lint", str(out), "--target", str(tmp_path / "mine.yaml")) == 3
    assert run(monkeypatch, "lint", str(out), "--target", "tiny") == 2
    assert run(monkeypatch, "lint", str(tmp_path / "nothing")) == 2


def test_compile_refuses_an_unknown_target_before_any_work(
    monkeypatch: Any, capsys: Any
) -> None:
    assert run(monkeypatch, "compile", "demo", "--set", 'export.target=["toaster"]') == 2
    assert "there is no target 'toaster'" in " ".join(capsys.readouterr().err.split())


def test_compile_makes_graphs_for_the_target_of_the_settings(tmp_path: Path) -> None:
    board = tmp_path / "board.yaml"
    board.write_text(
        "name: board\ndevice: d\nengine: tensorrt\nversion: '10.3'\nimporter: nine\n"
        "unified_memory: true\ndtypes: [float32]\n"
    )
    (tmp_path / "importers").mkdir()
    (tmp_path / "importers/nine.yaml").write_text(
        "name: nine\nextends: tensorrt-10.3\nmax_topk: 9\n"
    )
    config = make_config(
        {
            "routing": {"buckets": 1, "multiple_of": 8},
            "rollouts": {"trajectories": 2, "steps": 2},
            "calibration": {"steps": 2, "batch": 2, "ratios": "uniform"},
            "export": {"target": [str(board), "rtx"]},
        }
    )
    model, inputs = models.tiny_dit()
    artifact = dcr.compile(
        model, tmp_path / "out", example_inputs=inputs, budget="70%", config=config
    )
    kept = {k for row in artifact.manifest.schedule.values() for k in row}
    assert max(k for k in kept if k < 64) > 9
    assert lint(artifact.folder, [find_target(str(board))]) == []
    sizes = {
        int(axis or 0)
        for node in read_facts(artifact.folder / "onnx/bucket_00.onnx").nodes
        if node.proto.op_type == "TopK"
        for axis in (node.output_shapes[0] or ())[-1:]
    }
    assert max(sizes) == 9


# ------------------------------------------------------------------------- artifacts that were touched


def _cut_node_map(folder: Path) -> None:
    path = folder / "model/node_map.json"
    path.write_bytes(path.read_bytes()[:20])


def _swap_graphs(folder: Path) -> None:
    data = (folder / "onnx/bucket_00.onnx").read_bytes()
    (folder / "onnx/bucket_01.onnx").write_bytes(data)


@pytest.mark.parametrize("touch", [_cut_node_map, _swap_graphs])
def test_an_artifact_that_was_touched_is_not_linted(
    touch: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = device_artifact.write(tmp_path / "out")
    assert errors_of(folder, find_target("ort-cpu")) == []
    touch(folder)
    with pytest.raises(ArtifactError) as caught:
        lint(folder, [find_target("ort-cpu")])
    assert (caught.value.code, caught.value.exit_code) == ("DCR-A004", 7)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"onnx/bucket_00.onnx": 5}', '{"a": {"b": 1}}', "\xff"]
)
def test_a_node_map_of_another_form_is_refused_though_its_hash_fits(
    text: str, tmp_path: Path
) -> None:
    folder = device_artifact.write(tmp_path / "out")
    (folder / "model/node_map.json").write_bytes(text.encode("latin-1"))
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, files=hash_files(folder)))
    with pytest.raises(ArtifactError, match=r"node_map\.json cannot be read"):
        lint(folder, [find_target("ort-cpu")])
