"""Which engines an artifact becomes, in both modes, and how `auto` chooses between them."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffcr_compile.engine_plan import (
    EnginePlan,
    EngineSpec,
    LengthsSpec,
    ProfileSpec,
    choose_mode,
    plan_engines,
)
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest, read_manifest, write_manifest
from diffcr_compile.planning.targets import find_target

SCHEDULE = {"blocks.0": [16, 32, 16], "blocks.1": [64, 64, 64], "blocks.2": [0, 8, 0]}
SHARED = {
    "onnx": "onnx/profiles.onnx",
    "buckets": [0, 1, 2],
    "kept_inputs": {"kref_blocks_0": "blocks.0"},
    "remark": "",
}
GIGABYTE = 10**9


def make_manifest(
    graphs: list[str], profile_graphs: list[dict[str, Any]], weight_bytes: int = 1000
) -> Manifest:
    names = {*graphs, *(row["onnx"] for row in profile_graphs), "onnx/weights.bin", "golden/g"}
    spec = [{"name": "x", "dtype": "float32", "shape": [2, 3]}]
    return Manifest(
        created="",
        model={},
        versions={},
        inputs=spec,
        outputs=spec,
        timestep_input="x",
        sample_input="x",
        buckets=[
            {"index": i, "low": i, "high": i + 1, "weight": 1, "onnx": g, "golden": "golden/g"}
            for i, g in enumerate(graphs)
        ],
        weights="onnx/weights.bin",
        schedule=SCHEDULE,
        num_tokens=dict.fromkeys(SCHEDULE, 64),
        budget={},
        parity={"tolerance": 1e-4, "measure": "max_abs"},
        files={name: {"sha256": "0", "bytes": weight_bytes} for name in names},
        stages={},
        profile_graphs=profile_graphs,
    )


GRAPHS = [f"onnx/bucket_{i:02d}.onnx" for i in range(3)]


def pinned(buckets: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> ProfileSpec:
    return ProfileSpec((LengthsSpec(buckets, shapes),))


def test_per_bucket_is_one_static_engine_per_graph() -> None:
    plan = plan_engines(make_manifest(GRAPHS, [SHARED]), "per_bucket")
    assert plan == EnginePlan(
        "per_bucket",
        tuple(
            EngineSpec(f"bucket_{i:02d}", graph, (pinned((i,), {}),))
            for i, graph in enumerate(GRAPHS)
        ),
    )


def test_buckets_that_share_a_graph_share_its_engine() -> None:
    graphs = [GRAPHS[0], GRAPHS[1], GRAPHS[0]]
    plan = plan_engines(make_manifest(graphs, []), "per_bucket")
    assert [e.profiles[0].buckets for e in plan.engines] == [(0, 2), (1,)]
    assert plan.place(2) == (plan.engines[0], 0, 0)


def test_profiles_is_one_engine_with_the_kept_tokens_as_lengths() -> None:
    plan = plan_engines(make_manifest(GRAPHS, [SHARED]), "profiles")
    (engine,) = plan.engines
    assert engine.name == "profiles"
    # buckets 0 and 2 keep the same tokens, so one profile serves both
    assert engine.profiles == (
        pinned((0, 2), {"kref_blocks_0": (16,)}),
        pinned((1,), {"kref_blocks_0": (32,)}),
    )
    assert [p.bounds() for p in engine.profiles] == [
        {"kref_blocks_0": ((16,),) * 3},
        {"kref_blocks_0": ((32,),) * 3},
    ]
    assert [plan.place(bucket).profile for bucket in range(3)] == [0, 1, 0]


def test_a_spanning_profile_goes_from_the_least_to_the_most_kept_tokens() -> None:
    manifest = make_manifest(GRAPHS, [{**SHARED, "kept_inputs": {"a": "blocks.0"}}])
    manifest = dataclasses.replace(manifest, schedule={"blocks.0": [48, 16, 24]})
    plan = plan_engines(manifest, "profiles", "spanning")
    ((profile,),) = (engine.profiles for engine in plan.engines)
    assert profile.bounds() == {"a": ((16,), (24,), (48,))}
    assert profile.buckets == (0, 1, 2)
    places = [plan.place(bucket) for bucket in range(3)]
    assert [place.profile for place in places] == [0, 0, 0]
    assert [place.shapes for place in places] == [{"a": (48,)}, {"a": (16,)}, {"a": (24,)}]
    # a static graph has nothing to span
    assert plan_engines(manifest, "per_bucket", "spanning") == plan_engines(
        manifest, "per_bucket"
    )


def test_graphs_of_several_structures_give_one_engine_each() -> None:
    rows = [{**SHARED, "buckets": [0, 2]}, {**SHARED, "onnx": GRAPHS[1], "buckets": [1]}]
    rows[1]["kept_inputs"] = {}
    plan = plan_engines(make_manifest(GRAPHS, rows), "profiles")
    assert [e.name for e in plan.engines] == ["profiles", "bucket_01"]
    assert plan.engines[1].profiles == (pinned((1,), {}),)


def test_without_profiles_graphs_the_mode_is_refused_with_the_setting() -> None:
    with pytest.raises(UsageError, match=r"export\.profiles"):
        plan_engines(make_manifest(GRAPHS, []), "profiles")
    with pytest.raises(UsageError, match=r"'both' is unknown; use one of"):
        plan_engines(make_manifest(GRAPHS, []), "both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"layout 'wide' is unknown; use one of"):
        plan_engines(make_manifest(GRAPHS, [SHARED]), "profiles", "wide")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["pinned", "spanning"])
@pytest.mark.parametrize("mode", ["profiles", "per_bucket"])
def test_a_plan_survives_json(mode: Any, layout: Any) -> None:
    plan = plan_engines(make_manifest(GRAPHS, [SHARED]), mode, layout)
    assert EnginePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_bucket_that_no_plan_has_is_an_error() -> None:
    plan = plan_engines(make_manifest(GRAPHS, [SHARED]), "profiles")
    with pytest.raises(UsageError, match="no timestep bucket 3, the plan has 3"):
        plan.place(3)


Edit = Callable[[dict[str, Any]], Any]


def first(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["engines"][0]
    return found


def lengths(data: dict[str, Any]) -> dict[str, Any]:
    """The lengths of the second profile."""
    found: dict[str, Any] = first(data)["profiles"][1][0]
    return found


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(mode="fast"), "mode is 'fast', expected one of"),
        (lambda d: d.pop("mode"), "the plan must have the keys"),
        (lambda d: d.update(engines=[]), "expected at least one"),
        (lambda d: d.update(engines={}), "engines must be a list"),
        (lambda d: d["engines"].append(copy.deepcopy(first(d))), "each once"),
        (lambda d: first(d).update(name="../x"), "letters, digits"),
        (lambda d: first(d).update(name=3), "must be text"),
        (lambda d: first(d).update(onnx="../a.onnx"), "no path of an ONNX file inside"),
        (lambda d: first(d).update(onnx="/a.onnx"), "no path of an ONNX file inside"),
        (lambda d: first(d).update(profiles=[]), "needs a profile"),
        (lambda d: first(d)["profiles"].pop(), r"timestep buckets are \[0, 2\]"),
        (lambda d: lengths(d).update(buckets=[2]), r"\[0, 2, 2\]"),
        (lambda d: lengths(d).update(buckets=["1"]), "numbers as buckets"),
        (lambda d: lengths(d).update(buckets=[]), "profile 1: it needs a timestep bucket"),
        (lambda d: first(d)["profiles"][1].pop(), "each profile a timestep bucket"),
        (lambda d: lengths(d).update(shapes={}), r"profile 1: it is for the inputs \[\]"),
        (lambda d: [p[0].update(shapes={}) for p in first(d)["profiles"]], "has one profile"),
        (
            lambda d: lengths(d)["shapes"].update(kref_blocks_0=[16, 1]),
            "has 2 axes, and 1 in the first",
        ),
        (
            lambda d: lengths(d)["shapes"].update(kref_blocks_0=[0]),
            "expected sizes above 0",
        ),
        (
            lambda d: lengths(d)["shapes"].update(kref_blocks_0=16),
            "shape of 'kref_blocks_0' must be a list",
        ),
    ],
)
def test_a_damaged_plan_says_where(edit: Edit, words: str) -> None:
    data = plan_engines(make_manifest(GRAPHS, [SHARED]), "profiles").to_json()
    edit(data)
    with pytest.raises(ArtifactError, match=words) as caught:
        EnginePlan.from_json(data)
    assert caught.value.code == "DCR-A008"


# ------------------------------------------------------------------------------------- auto


def test_auto_shares_weights_where_no_wrong_results_are_known() -> None:
    choice = choose_mode(make_manifest(GRAPHS, [SHARED]), find_target("jetson-thor@jp7.1"))
    assert choice.mode == "profiles"
    assert "1×" in choice.reason
    assert "not 3×" in choice.reason


def test_auto_builds_static_engines_for_tensorrt_10_3_and_cites_the_threads() -> None:
    target = find_target("jetson-orin-nano@jp6.2")
    choice = choose_mode(make_manifest(GRAPHS, [SHARED]), target)
    assert choice.mode == "per_bucket"
    assert "NVIDIA/TensorRT#4419" in choice.reason
    assert "one engine loaded" not in choice.reason
    # wrong results are worse than little memory: the mode stays, the reason says what to do
    large = choose_mode(make_manifest(GRAPHS, [SHARED], 3 * GIGABYTE), target)
    assert large.mode == "per_bucket"
    assert "3 engines hold 9.00 GB" in large.reason
    assert "one engine loaded at a time" in large.reason


@pytest.mark.parametrize(
    ("graphs", "rows", "words"),
    [
        ([GRAPHS[0]] * 3, [SHARED], "the same static graph"),
        (GRAPHS, [], "without profiles graphs"),
        (
            GRAPHS,
            [
                {**SHARED, "onnx": graph, "buckets": [i], "kept_inputs": {}}
                for i, graph in enumerate(GRAPHS)
            ],
            "more than numbers of kept tokens",
        ),
    ],
)
def test_auto_says_why_nothing_can_be_shared(
    graphs: list[str], rows: list[dict[str, Any]], words: str
) -> None:
    choice = choose_mode(make_manifest(graphs, rows), find_target("rtx"))
    assert choice.mode == "per_bucket"
    assert words in choice.reason


def test_nothing_is_built_for_onnx_runtime() -> None:
    with pytest.raises(UsageError, match="no engine is built"):
        choose_mode(make_manifest(GRAPHS, [SHARED]), find_target("onnxruntime-cpu"))


# ------------------------------------------------------------------------- in the manifest


@pytest.mark.parametrize(
    "rows",
    [
        {},
        ["x"],
        [{**SHARED, "buckets": [0, 1]}],
        [{**SHARED, "buckets": [0, 1, 1]}],
        [{**SHARED, "kept_inputs": {"kref": "blocks.9"}}],
        [{**SHARED, "kept_inputs": {"kref": ["blocks.0"]}}],
        [{**SHARED, "onnx": 3}],
        [{k: v for k, v in SHARED.items() if k != "remark"}],
    ],
)
def test_a_manifest_with_wrong_profiles_graphs_is_damaged(tmp_path: Path, rows: Any) -> None:
    manifest = make_manifest(GRAPHS, [SHARED])
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path).profile_graphs == [SHARED]
    object.__setattr__(manifest, "profile_graphs", rows)
    write_manifest(tmp_path, manifest)
    with pytest.raises(ArtifactError, match="profile_graphs must list") as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "DCR-A002"


def test_the_plan_loads_on_a_device_without_torch_onnx_and_pydantic() -> None:
    code = (
        "import sys; import diffcr_compile.engine_plan; "
        "print(sorted({'torch', 'onnx', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
