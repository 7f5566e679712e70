"""One graph for several buckets: the pass that opens K, the grouping of buckets, the exported graph."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffcr_compile as dcr
from diffcr_compile import routing
from diffcr_compile.engine_plan import plan_engines
from diffcr_compile.errors import (
    AccuracyError,
    PreconditionError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from diffcr_compile.export import artifact as artifact_module
from diffcr_compile.export import parity as parity_module
from diffcr_compile.export.lint import lint
from diffcr_compile.export.onnx_model import export_graph
from diffcr_compile.export.profiles_graph import group_buckets, open_program, tensorrt_topk
from diffcr_compile.export.weights import WEIGHTS_FILE
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.open_kept_tokens import OpenKeptTokens
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.planning.targets import all_targets
from diffcr_compile.program import Program, Stage, run_flat
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from diffcr_compile.validate import validate_artifact
from diffcr_compile.verify import verify
from tests.conftest import CLOSE, Case
from tests.test_passes import text

OPEN = """
graph():
    %x = placeholder[target=x]
    %condition = placeholder[target=condition]
    %kref_blocks_0 = placeholder[target=kref_blocks_0]
    %image_tokens = call_function[target=diffcr_compile.routing.image_tokens](args = (%x, 0, 6), kwargs = {})
    %blocks_0_logits = call_module[target=blocks_0_router](args = (%image_tokens,), kwargs = {})
    %kept_length = call_function[target=diffcr_compile.routing.kept_length](args = (%kref_blocks_0,), kwargs = {})
    %blocks_0_index = call_function[target=diffcr_compile.routing.select_tokens](args = (%blocks_0_logits, %kept_length, False), kwargs = {})
    %blocks_0_kept = call_function[target=diffcr_compile.routing.gather_tokens](args = (%x, %blocks_0_index, 1, 0, 6, True), kwargs = {})
    %blocks_0 = call_module[target=blocks.0](args = (%blocks_0_kept, %condition), kwargs = {})
    %blocks_0_scatter = call_function[target=diffcr_compile.routing.scatter_tokens](args = (%x, %blocks_0_index, %blocks_0_kept, %blocks_0, None, 0, 6), kwargs = {})
    return [blocks_0_scatter]
"""


def half(case: Case) -> dict[str, int]:
    return {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}


def opened(case: Case) -> Program:
    return run_passes(case.frozen(half(case)), [OpenKeptTokens(half(case))])


def run_at(program: Program, column: Mapping[str, int]) -> list[torch.Tensor]:
    lengths = {name: torch.zeros(column[b]) for name, b in program.kept_inputs.items()}
    with torch.no_grad():
        return run_flat(program, {**program.example, **lengths})


def schedule_of(case: Case, rows: Mapping[str, Sequence[int]]) -> TokenSchedule:
    num_tokens = {spec.name: spec.num_tokens for spec in case.routed.blocks}
    count = len(next(iter(rows.values())))
    return TokenSchedule(
        {b: tuple(k) for b, k in rows.items()}, num_tokens, TimestepBuckets.even(count, 0, 1)
    )


# ------------------------------------------------------------------------------------ the pass


def test_golden_graph_of_one_block(cases: Callable[..., Case]) -> None:
    case = cases("one_block")
    program = OpenKeptTokens({"blocks.0": 4})(case.frozen({"blocks.0": 3})).program
    assert text(program) == OPEN.strip()
    assert program.stage == Stage.OPEN
    assert list(program.signature.inputs) == ["x", "condition", "kref_blocks_0"]
    assert program.example["kref_blocks_0"].shape == (4,)
    # called like the model, plus the length
    inputs = dict(case.inputs)
    expected = case.frozen({"blocks.0": 4}).module(**inputs)
    assert torch.equal(program.module(**inputs, kref_blocks_0=torch.empty(4)), expected)


def test_it_leaves_its_input_alone_and_edits_nothing_for_no_blocks(
    cases: Callable[..., Case],
) -> None:
    case = cases("dit")
    frozen = case.frozen(half(case))
    before = str(frozen.graph), frozen.module.code, dict(frozen.example)
    result = OpenKeptTokens(half(case))(frozen)
    assert (str(frozen.graph), frozen.module.code, dict(frozen.example)) == before
    assert result.edits == len(case.names)
    assert OpenKeptTokens({})(frozen).program is frozen


@pytest.mark.parametrize("name", ["plain", "sd3", "flux"])
@settings(deadline=None, max_examples=3)
@given(data=st.data())
def test_one_program_computes_what_each_frozen_one_does(
    cases: Callable[..., Case], name: str, data: st.DataObject
) -> None:
    """Every K from 1 to N, N included, where FROZEN has no routing any more."""
    case = cases(name)
    column = {
        spec.name: data.draw(st.integers(1, spec.num_tokens)) for spec in case.routed.blocks
    }
    frozen = case.frozen(column)
    with torch.no_grad():
        expected = run_flat(frozen, frozen.example)
    for got, want in zip(run_at(opened(case), column), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_it_refuses_in_words(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    names, frozen = case.names, case.frozen(half(case))
    with pytest.raises(PreconditionError, match="needs a FROZEN program, got ROUTED"):
        OpenKeptTokens(half(case))(case.routed)
    full = case.routed.block(names[0]).num_tokens
    with pytest.raises(PreconditionError, match=r"select no tokens in this graph.*0 < K < N"):
        OpenKeptTokens({names[0]: 4})(case.frozen({**half(case), names[0]: full}))
    with pytest.raises(PreconditionError, match=f"has {full} tokens, {full + 1} were asked"):
        OpenKeptTokens({names[0]: full + 1})(frozen)
    pieces = FreezeKeptTokens(case.schedule(half(case)), 0, max_topk=5)(case.routed).program
    with pytest.raises(PreconditionError, match="in pieces for a TopK of at most 5"):
        OpenKeptTokens(half(case))(pieces)


def test_the_verifier_finds_a_length_that_belongs_to_another_block(
    cases: Callable[..., Case],
) -> None:
    program = opened(cases("plain"))
    verify(program)
    graph = program.copy_graph()
    lengths = list(graph.find_nodes(op="call_function", target=routing.kept_length))
    first, second = (node.args[0] for node in lengths[:2])
    lengths[0].args, lengths[1].args = (second,), (first,)
    with pytest.raises(VerificationError, match="are read as K of blocks, expected"):
        verify(program.with_graph(graph))
    lengths[0].args = (graph.find_nodes(op="call_module")[0],)
    with pytest.raises(VerificationError, match="expected the length of an input"):
        verify(program.with_graph(graph))


# -------------------------------------------------------------------------------- the grouping


def test_buckets_that_differ_in_k_only_are_one_group(cases: Callable[..., Case]) -> None:
    case = cases("plain")  # 36 tokens
    one, two = case.names
    (group,) = group_buckets(schedule_of(case, {one: [4, 36, 8], two: [9, 9, 9]}), 3840)
    assert group.buckets == (0, 1, 2)
    assert group.kept == {one: (4, 36, 8)}  # the other keeps its integer
    assert group.remark == ""


def test_skipped_blocks_and_large_ks_split_the_groups_and_the_remark_says_so(
    cases: Callable[..., Case],
) -> None:
    case = cases("plain")
    one, two = case.names
    rows = {one: [4, 0, 8, 0], two: [9, 9, 12, 30]}
    groups = group_buckets(schedule_of(case, rows), 20)
    assert [g.buckets for g in groups] == [(0, 2), (1,), (3,)]
    assert groups[0].kept == {one: (4, 8), two: (9, 12)}
    assert groups[1].kept == groups[2].kept == {}
    assert "blocks.0 skipped in some buckets" in groups[0].remark
    assert "blocks.1 with more kept tokens than one TopK takes" in groups[0].remark
    assert len(group_buckets(schedule_of(case, rows), None)) == 2


def test_the_topk_is_that_of_every_known_tensorrt() -> None:
    assert tensorrt_topk(()) == 3840
    small = all_targets()[0].model_copy(update={"max_topk": 100})
    assert tensorrt_topk((small,)) == 100


# ---------------------------------------------------------------------------------- the export

ROWS = {"blocks.0": [9, 30, 36], "blocks.1": [18, 18, 12]}


def frozen_programs(case: Case, rows: Mapping[str, Sequence[int]]) -> list[Program]:
    schedule = schedule_of(case, rows)
    return [
        run_passes(case.routed, [FreezeKeptTokens(schedule, b), RemoveFullBlocks()])
        for b in range(len(schedule.buckets))
    ]


@pytest.fixture(scope="module", autouse=True)
def graphs_made_once() -> Iterator[None]:
    """torch.onnx.export takes seconds and is not what is tested: equal columns, one export."""
    made: dict[str, tuple[onnx.ModelProto, dict[str, str]]] = {}

    def cached(
        program: Program, store: object = None
    ) -> tuple[onnx.ModelProto, dict[str, str]]:
        key = str(program.graph) + str(program.kept_inputs)
        if key not in made:
            made[key] = export_graph(program)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact_module, "export_graph", cached)
        yield


@pytest.fixture(scope="module")
def frozen(cases: Callable[..., Case]) -> list[Program]:
    return frozen_programs(cases("plain"), ROWS)


@pytest.fixture(scope="module")
def exported(
    frozen: list[Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("profiles") / "out"
    dcr.export([p.module for p in frozen], folder)
    return read_manifest(folder), folder


def test_the_artifact_has_one_more_graph_over_the_same_weights(
    exported: tuple[Manifest, Path], frozen: list[Program], tmp_path: Path
) -> None:
    manifest, folder = exported
    assert manifest.profile_graphs == [
        {
            "onnx": "onnx/profiles.onnx",
            "buckets": [0, 1, 2],
            "kept_inputs": {
                "kref_blocks_0": "blocks.0",
                "kref_blocks_1": "blocks.1",
            },
            "remark": "",
        }
    ]
    dcr.export([p.module for p in frozen], tmp_path / "out", profiles=False)
    assert read_manifest(tmp_path / "out").profile_graphs == []
    sizes = [(f / "onnx" / WEIGHTS_FILE).stat().st_size for f in (folder, tmp_path / "out")]
    assert sizes[0] <= 1.05 * sizes[1]


def test_its_parity_with_every_frozen_bucket_is_in_the_manifest(
    exported: tuple[Manifest, Path],
) -> None:
    rows = exported[0].parity["profiles"]
    assert [row["bucket"] for row in rows] == [0, 1, 2]
    assert all(row["passed"] and row["max_abs"] <= 1e-4 for row in rows)


def test_validation_runs_it_at_every_bucket(exported: tuple[Manifest, Path]) -> None:
    rows = validate_artifact(exported[1])
    step = "golden -> ONNX Runtime"
    assert [(row["step"], row["bucket"]) for row in rows] == [
        *((step, bucket) for bucket in range(3)),
        *((f"{step}, onnx/profiles.onnx", bucket) for bucket in range(3)),
    ]


def test_only_the_lengths_are_open_and_no_value_of_them_is_read(
    exported: tuple[Manifest, Path],
) -> None:
    model = onnx.load(exported[1] / "onnx/profiles.onnx", load_external_data=False)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input}
    open_inputs = [n for n, dims in shapes.items() if any(d.dim_param for d in dims)]
    assert open_inputs == list(exported[0].profile_graphs[0]["kept_inputs"])
    readers = [n.op_type for n in model.graph.node if set(n.input) & set(open_inputs)]
    assert set(readers) == {"Shape"}
    assert not model.graph.value_info
    maps = json.loads((exported[1] / "model/node_map.json").read_text())
    assert set(maps["onnx/profiles.onnx"]) == {node.name for node in model.graph.node}


def test_every_tensorrt_target_takes_it(exported: tuple[Manifest, Path]) -> None:
    targets = [t for t in all_targets() if t.engine != "onnxruntime"]
    found = [f for f in lint(exported[1], targets) if f.file == "onnx/profiles.onnx"]
    assert not [f for f in found if f.severity == "error"]
    # the reports of wrong results with open lengths are said for it, and for it alone
    assert "known-bug:dynamic-shapes-10.3" in {f.rule for f in found}


def test_the_plan_has_one_profile_per_column(exported: tuple[Manifest, Path]) -> None:
    (engine,) = plan_engines(exported[0], "profiles").engines
    assert [dict(one.shapes) for p in engine.profiles for one in p.lengths] == [
        {"kref_blocks_0": (9,), "kref_blocks_1": (18,)},
        {"kref_blocks_0": (30,), "kref_blocks_1": (18,)},
        {"kref_blocks_0": (36,), "kref_blocks_1": (12,)},
    ]
    assert [len(p.lengths) for p in engine.profiles] == [1, 1, 1]  # pinned, without a target


def test_buckets_of_another_structure_keep_their_own_graph(
    cases: Callable[..., Case], tmp_path: Path
) -> None:
    rows = {"blocks.0": [9, 0, 30], "blocks.1": [18, 18, 12]}
    frozen = frozen_programs(cases("plain"), rows)
    manifest = dcr.export([p.module for p in frozen], tmp_path / "out").manifest
    first, second = manifest.profile_graphs
    assert (first["onnx"], first["buckets"]) == ("onnx/profiles.onnx", [0, 2])
    assert (second["onnx"], second["buckets"]) == ("onnx/bucket_01.onnx", [1])
    assert "skipped in some buckets" in second["remark"]
    assert [row["bucket"] for row in manifest.parity["profiles"]] == [0, 2]


def test_a_model_whose_k_cannot_be_open_says_so_and_goes_on(
    frozen: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact_module.export_graph

    def fails(program: Program, store: object = None) -> object:
        if program.kept_inputs:
            raise UnsupportedModelError("torch.onnx.export failed: K must be 9")
        return made(program)

    monkeypatch.setattr(artifact_module, "export_graph", fails)
    manifest = dcr.export([p.module for p in frozen], tmp_path / "out").manifest
    assert [row["onnx"] for row in manifest.profile_graphs] == [
        f"onnx/bucket_0{i}.onnx" for i in range(3)
    ]
    assert "K must be 9" in manifest.profile_graphs[0]["remark"]


def test_a_graph_of_several_buckets_that_computes_something_else_is_no_artifact(
    frozen: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = parity_module.read_golden

    def other(path: Path) -> object:
        inputs, outputs = read(path)
        return inputs, [output + np.float32(0.01) for output in outputs]

    monkeypatch.setattr(parity_module, "read_golden", other)
    with pytest.raises(
        AccuracyError, match=r"bucket 0: .* differs from FROZEN by 1\.0e-02 in onnx/pro"
    ):
        dcr.export([p.module for p in frozen], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_program_that_does_not_know_its_routed_one_is_refused(frozen: list[Program]) -> None:
    (group,) = group_buckets(frozen[0].schedule, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"freeze it with dcr\.freeze"):
        open_program(dataclasses.replace(frozen[0], routed=None), group, None)
