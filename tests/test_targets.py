"""Facts about devices, against what the compiler itself writes."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import yaml

import diffcr_compile as dcr
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.export.onnx_model import MAX_IR_VERSION, OPSET, onnx_from_program
from diffcr_compile.planning.target_files import KnownBug, as_numbers
from diffcr_compile.planning.targets import (
    ROUTING_OPS,
    all_targets,
    find_target,
    find_targets,
    largest_topk,
    read_targets,
)
from tests import models

SHIPPED = Path(dcr.__file__).parent / "export" / "targets"

TENSORRT = ("orin-jp6", "thor-jp7", "rtx")


def test_every_target_reads_the_opset_and_ir_that_are_written() -> None:
    for target in all_targets():
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
    assert (target.max_topk, target.operators, target.sm) == (None, None, ())
    assert target.limits() == "opset <= 21, IR <= 10, types float32, float16, float64"


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


def test_the_targets_of_the_package() -> None:
    assert {target.name for target in all_targets()} == {
        "jetson-orin-nano@jp6.2",
        "jetson-orin-nx",
        "jetson-agx-orin@jp6.2",
        "jetson-agx-orin@jp7.2",
        "jetson-thor@jp7.1",
        "jetson-thor@jp7.2",
        "rtx",
        "datacenter",
        "onnxruntime-cpu",
        "onnxruntime-cuda",
    }
    assert [find_target(n).name for n in ("orin-jp6", "thor-jp7", "ort-cpu")] == [
        "jetson-agx-orin@jp6.2",
        "jetson-thor@jp7.1",
        "onnxruntime-cpu",
    ]


def test_jetsons_share_their_memory_and_say_how_much_it_is() -> None:
    for target in all_targets():
        if target.name.startswith("jetson"):
            assert target.unified_memory
            assert target.memory_bytes is not None
            assert target.memory_bytes >= 8e9
            assert target.operators is not None


def test_unknown_targets_are_refused_with_the_list_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'jetson-orin-nx'.*orin-jp6.*rtx"):
        find_target("jetson-orin")
    with pytest.raises(UsageError, match=r"there is no target 'toaster'\. The targets are"):
        find_target("toaster")


def test_the_smallest_top_k_of_several_targets_counts(tmp_path: Path) -> None:
    assert largest_topk(find_targets(None)) is None
    assert largest_topk(find_targets("ort-cpu")) is None
    assert largest_topk(find_targets(["ort-cpu", "rtx"])) == 3840
    write(
        tmp_path / "importers" / "small.yaml",
        "name: small\nextends: tensorrt-10.3\nmax_topk: 9",
    )
    path = write(tmp_path / "mine.yaml", MINE.replace("tensorrt-10.15", "small"))
    assert largest_topk(find_targets([str(path), "rtx"])) == 9


# ---------------------------------------------------------------------- of the user's own

MINE = """
name: my-board
device: a board
engine: tensorrt
version: "10.3"
importer: tensorrt-10.15
sm: [87]
unified_memory: true
dtypes: [float16]
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_target_may_stand_in_a_file_or_a_folder_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", MINE)
    by_path = find_target(str(path))
    assert by_path == find_target("my-board", tmp_path) == find_target("my-board", path)
    assert (by_path.runtime, by_path.max_opset, by_path.dtypes) == (
        "TensorRT 10.3",
        24,
        ("float16",),
    )
    assert by_path.bugs[0].id == "dynamic-shapes-10.3"
    assert len(all_targets(tmp_path)) == len(all_targets()) + 1


def test_a_target_of_the_user_wins_over_one_of_the_package(tmp_path: Path) -> None:
    write(tmp_path / "rtx.yaml", MINE.replace("my-board", "rtx"))
    assert find_target("rtx", tmp_path).version == "10.3"
    assert len(all_targets(tmp_path)) == len(all_targets())


def test_importers_and_bugs_of_the_user_are_read_beside_the_target(tmp_path: Path) -> None:
    write(
        tmp_path / "importers" / "mine.yaml",
        "name: mine\nextends: tensorrt-10.3\nremoved: [Mish]\nlifted: [cumsum-loop]\nmax_rank: 4\n",
    )
    bug = "id: hot, engine: tensorrt, first: '10.3', effect: e, remedy: r, threads: [o/r#1]"
    write(tmp_path / "bugs" / "mine.yaml", f"[{{{bug}}}]")
    write(tmp_path / "mine.yaml", MINE.replace("tensorrt-10.15", "mine"))
    (target,) = read_targets(tmp_path)
    base = find_target("jetson-orin-nx")
    assert target.operators is not None
    assert base.operators is not None
    assert set(base.operators) - set(target.operators) == {"Mish"}
    assert {s.id for s in base.forbidden} - {s.id for s in target.forbidden} == {"cumsum-loop"}
    assert (target.max_rank, target.max_topk) == (4, 3840)
    assert "hot" in {bug.id for bug in target.bugs}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINE + "memory_byte: 8",
            r"unknown key 'memory_byte' \(did you mean 'memory_bytes'\?\)",
        ),
        (
            MINE.replace("tensorrt-10.15", "tensorrt-10.51"),
            "no importer 'tensorrt-10.51' .*10.15",
        ),
        (MINE.replace("engine: tensorrt", "engine: tensort"), "engine: Input should be"),
        (MINE.replace("[float16]", "[]"), "dtypes: .*at least 1 item"),
        (MINE + "memory_bytes: -1", "memory_bytes: .*greater than 0"),
        ("name: [", "is not YAML"),
        ("- 1", "expected keys and values, found list"),
    ],
)
def test_a_wrong_file_is_refused_and_the_key_is_named(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(UsageError, match=rf"mine.yaml.*{message}"):
        find_target(str(path))


def test_missing_files_and_importers_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml is not a file"):
        find_target(str(tmp_path / "gone.yaml"))
    with pytest.raises(UsageError, match="has no YAML file"):
        all_targets(tmp_path)
    write(tmp_path / "importers" / "a.yaml", "name: a\nextends: b")
    write(tmp_path / "importers" / "b.yaml", "name: b\nextends: a")
    write(tmp_path / "mine.yaml", MINE.replace("tensorrt-10.15", "a"))
    with pytest.raises(UsageError, match="importer 'a' extends itself"):
        all_targets(tmp_path)
    write(tmp_path / "importers" / "a.yaml", "name: a\nextends: tensorrt-10.3\nlifted: [nix]")
    with pytest.raises(UsageError, match="importer a: there is no 'nix' to take away"):
        all_targets(tmp_path)


def test_bugs_are_found_by_version_and_compute_capability() -> None:
    facts = {"effect": "e", "remedy": "r", "threads": ["o/r#1"]}
    bug = KnownBug(id="b", engine="tensorrt", first="10.3", fixed="10.10", sm=(87,), **facts)
    assert as_numbers("10.10") > as_numbers("10.9")
    assert bug.concerns("tensorrt", "10.3", [87])
    assert bug.concerns("tensorrt", "10.9", [86, 87])
    assert not bug.concerns("tensorrt", "10.10", [87])
    assert not bug.concerns("tensorrt", "10.2", [87])
    assert not bug.concerns("tensorrt", "10.3", [110])
    assert not bug.concerns("tensorrt-rtx", "10.3", [87])
    ids = {t.name: {b.id for b in t.bugs} for t in all_targets()}
    assert "dynamic-shapes-10.3" in ids["jetson-orin-nx"]
    assert "thor-float16-10.13" in ids["jetson-thor@jp7.1"] - ids["jetson-agx-orin@jp7.2"]
    assert ids["onnxruntime-cpu"] == set()


def test_every_bug_names_a_thread() -> None:
    for target in all_targets():
        for bug in target.bugs:
            assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in bug.threads)


def test_an_artifact_is_exported_again_when_its_target_says_something_else(
    tmp_path: Path,
) -> None:
    """The settings name a file; what it says counts."""
    shipped = yaml.safe_load((SHIPPED / "onnxruntime-cpu.yaml").read_text())
    importer = tmp_path / "importers" / "mine.yaml"
    importer.parent.mkdir()
    facts = {"name": "mine-importer", "extends": shipped["importer"]}
    shipped.pop("aliases", None)
    target = tmp_path / "mine.yaml"
    target.write_text(yaml.safe_dump({**shipped, "name": "mine", "importer": facts["name"]}))
    model, inputs = models.plain()
    settings = {
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 2, "steps": 2, "batch": 2},
        "calibration": {"steps": 0, "batch": 2},
        "export": {"profiles": False, "target": [str(target)]},
    }

    def compiled() -> None:
        dcr.compile(
            model,
            tmp_path / "out",
            example_inputs=inputs,
            budget="80%",
            config=settings,
            until="export",
        )

    importer.write_text(yaml.safe_dump(facts))
    compiled()
    importer.write_text(yaml.safe_dump({**facts, "max_opset": 12}))
    with pytest.raises(UnsupportedModelError, match="opset") as caught:
        compiled()
    assert caught.value.code == "DCR-M003"
