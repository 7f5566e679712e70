"""Latency tables: what is measured, what is read back, and budgets over them."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffcr_compile as dcr
from diffcr_compile.block_graphs import block_groups, fingerprint_of
from diffcr_compile.budgets import budget_costs, cost_table
from diffcr_compile.config import RoutingConfig, make_config
from diffcr_compile.errors import ArtifactError, BudgetError, DiffCRError, UsageError
from diffcr_compile.latency_bench import measure_latency, write_kit
from diffcr_compile.latency_table import isotonic, latency_costs, read_latency_table
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.program import run_flat
from diffcr_compile.runtime import block_bench
from diffcr_compile.runtime.latency import checksum
from diffcr_compile.runtime.timing import in_turns, summarise
from diffcr_compile.schedule import (
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
    cost_of,
)
from diffcr_compile.solver import solve_least, solve_schedule
from diffcr_compile.summary import warnings_section
from tests import models
from tests.conftest import CLOSE
from tests.reference import SHAPES, _slow_forward
from tests.test_cli import run

ROUTING = RoutingConfig(multiple_of=32, min_keep_ratio=0.25, skip_blocks=True, buckets=2)
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]


@pytest.fixture(scope="module")
def table(cases: Callable[[str], Any]) -> dict[str, Any]:
    """Measured with torch on this machine: the figures are what they are, the form is what counts."""
    return measure_latency(
        cases("dit").routed, ROUTING, "tiny", backend="torch", threads=1, most_rounds=7
    )


def written(path: Path, table: dict[str, Any], **changes: Any) -> Path:
    """The table with changes, as the tool itself would have written it."""
    data = {**copy.deepcopy(table), "stable": True, **changes}
    path.write_text(json.dumps({**data, "sha256": checksum(data)}))
    return path


def with_times(table: dict[str, Any], times: dict[int, float], dense: float) -> dict[str, Any]:
    """The table of three blocks with these milliseconds."""
    (group,) = table["groups"]
    row = {
        **group,
        "levels": sorted(times),
        "milliseconds": [times[k] for k in sorted(times)],
        "errors": [0.0] * len(times),
    }
    check = {
        "kept_tokens": dict.fromkeys(BLOCKS, 32),
        "predicted_milliseconds": 7.0,
        "measured_milliseconds": 7.5,
    }
    return {"groups": [row], "dense_milliseconds": dense, "check": check}


# ------------------------------------------------------------------------------ measuring


def test_a_block_alone_is_the_block_in_the_model(cases: Callable[[str], Any]) -> None:
    """Against the slow loop around the user's own block, on what the model really gives it."""
    case = cases("dit")
    (group,) = block_groups(case.routed, dict.fromkeys(case.names, (0, 16, 64)))
    assert group.blocks == tuple(case.names)
    weight = case.router_weights()[case.names[0]]
    block = case.model.get_submodule(case.names[0])
    calls: list[Any] = []
    handle = block.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        case.model(**case.inputs)
        handle.remove()
        args, kwargs, whole = calls[0]
        slow = _slow_forward(
            block.forward, weight, 16, SHAPES["dit"], "straight_through", [], False
        )
        expected = slow(*args, **kwargs)
        for kept, answer in ((16, expected), (64, whole)):
            program = group.at(kept)
            (found,) = run_flat(program, program.example)
            torch.testing.assert_close(found, answer, **CLOSE)


def test_blocks_of_two_structures_are_two_groups(cases: Callable[[str], Any]) -> None:
    """The joint and the single blocks of one model, with rotary tables and a second stream."""
    routed = cases("flux").routed
    groups = block_groups(routed, {s.name: (12, s.num_tokens) for s in routed.blocks})
    assert len(groups) == 2
    for group in groups:
        program = group.at(12)
        with torch.no_grad():
            outputs = run_flat(program, program.example)
        assert all(output.isfinite().all() for output in outputs)


def test_fingerprints_tell_sizes_and_not_weights(cases: Callable[[str], Any]) -> None:
    case = cases("dit")
    levels = dict.fromkeys(case.names, (32, 64))
    one = fingerprint_of(case.routed, block_groups(case.routed, levels))
    other = cases("pixart").routed
    groups = block_groups(other, {spec.name: (32, 64) for spec in other.blocks})
    assert fingerprint_of(other, groups) != one
    weight = case.model.transformer_blocks[0].ff.net[2].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
        again = fingerprint_of(case.routed, block_groups(case.routed, levels))
        weight.copy_(before)
    assert again == one


def test_a_table_says_what_where_and_how_exactly(
    table: dict[str, Any], tmp_path: Path
) -> None:
    (group,) = table["groups"]
    assert group["blocks"] == BLOCKS
    assert group["levels"] == [32, 64]  # nothing to measure where the block is left out
    assert all(ms > 0 for ms in group["milliseconds"])
    assert table["check"]["kept_tokens"] == dict.fromkeys(BLOCKS, 32)
    assert table["backend"] == {"name": "torch", "device": "cpu", "threads": 1}
    assert {"torch", "numpy", "python"} <= set(table["versions"])
    assert table["stable"] == (table["worst_error"] <= table["stability"])
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    assert read_latency_table(path).model.name == "tiny"


def test_a_kit_is_measured_without_torch_and_gives_the_same_table(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path
) -> None:
    routed = cases("dit").routed
    write_kit(routed, ROUTING, "tiny", tmp_path / "kit")
    names = {path.name for path in (tmp_path / "kit").iterdir()}
    graphs = {"block_00_00032.onnx", "block_00_00064.onnx", "dense.onnx", "check.onnx"}
    assert names == {*graphs, "kit.json", "weights.bin"}
    out = tmp_path / "table.json"
    arguments = [str(tmp_path / "kit"), "-o", str(out), "--threads", "1", "--rounds", "7"]
    block_bench.main(arguments)
    found = json.loads(out.read_text())
    assert found["model"] == table["model"]
    assert [g["levels"] for g in found["groups"]] == [g["levels"] for g in table["groups"]]
    assert found["backend"]["name"] == "onnxruntime"
    assert read_latency_table(out).dense_milliseconds > 0
    weights = tmp_path / "kit/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="was changed") as caught:
        block_bench.open_kit(tmp_path / "kit")
    assert caught.value.code == "DCR-A021"


def test_a_kit_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kit.json").write_text(json.dumps({"files": {"../secret": "0"}}))
    with pytest.raises(ArtifactError, match="no file of the kit"):
        block_bench.open_kit(tmp_path)
    (tmp_path / "kit.json").write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        block_bench.open_kit(tmp_path)


# -------------------------------------------------------------------------------- timing


def test_drift_of_the_machine_does_not_reach_the_shares() -> None:
    """A machine that slows down threefold in the middle of it."""
    slower = [1, 1, 1, 1, 3, 3, 3, 3]
    found = summarise(
        {"dense": [0.2 * s for s in slower], "half": [0.05 * s for s in slower]}, "dense"
    )
    assert found["half"].share == pytest.approx(0.25)
    assert found["half"].error == pytest.approx(0)


def test_rounds_end_when_the_figures_are_stable_or_used_up() -> None:
    even = itertools.accumulate(itertools.cycle([0.0, 1.0, 0.0, 0.5]))
    runs = {"dense": int, "half": int}
    steady = in_turns(runs, "dense", 0.01, 50, clock=lambda: next(even))
    assert len(steady["half"].seconds) == 7
    assert steady["half"].share == 0.5
    noise = np.random.default_rng(0).uniform(0.2, 2, 10_000)
    uneven = itertools.accumulate(noise)
    shaky = in_turns(runs, "dense", 0.001, 12, clock=lambda: next(uneven))
    assert len(shaky["half"].seconds) == 12
    with pytest.raises(UsageError, match="at least 7 rounds"):
        in_turns({"dense": int}, "dense", 0.01, 3)


# -------------------------------------------------------------------------------- reading


def truncated(data: dict[str, Any]) -> str:
    return json.dumps(data)[:-40]


def faster(data: dict[str, Any]) -> str:
    data["groups"][0]["milliseconds"][0] *= 0.5
    return json.dumps(data)


def infinite(data: dict[str, Any]) -> str:
    data["groups"][0]["milliseconds"][0] = float("inf")
    return json.dumps(data)


def negative(data: dict[str, Any]) -> str:
    data["groups"][0]["milliseconds"][0] = -1.0
    return json.dumps({**data, "sha256": checksum(data)})


def falling_levels(data: dict[str, Any]) -> str:
    data["groups"][0]["levels"].reverse()
    return json.dumps({**data, "sha256": checksum(data)})


def unknown_key(data: dict[str, Any]) -> str:
    data["run"] = "rm -rf"
    return json.dumps({**data, "sha256": checksum(data)})


def twice(data: dict[str, Any]) -> str:
    data["groups"] *= 2
    return json.dumps({**data, "sha256": checksum(data)})


def other_version(data: dict[str, Any]) -> str:
    data["schema_version"] = 2
    return json.dumps({**data, "sha256": checksum(data)})


@pytest.mark.parametrize(
    "edit",
    [truncated, faster, infinite, negative, falling_levels, unknown_key, twice, other_version],
)
def test_edited_tables_are_refused(
    table: dict[str, Any], edit: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    path.write_text(edit(copy.deepcopy(table)))
    with pytest.raises(ArtifactError) as caught:
        read_latency_table(path)
    assert caught.value.code == "DCR-A020"


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ArtifactError):
        read_latency_table(path)


# -------------------------------------------------------------------------------- budgets


def config_with(path: Path, **budget: Any) -> Any:
    settings = {"metric": "latency", "table": str(path), **budget}
    return make_config({"routing": ROUTING.model_dump(), "budget": settings})


def test_costs_are_the_measured_times_and_the_rest_of_the_model(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path
) -> None:
    times = {32: 1.5, 64: 4.0}
    path = written(tmp_path / "t.json", table, **with_times(table, times, dense=15.0))
    costs = budget_costs(cases("dit").routed, config_with(path))
    assert costs.metric == "latency"
    assert dict(costs.per_level) == dict.fromkeys(BLOCKS, (0.0, 1.5, 4.0))
    assert costs.outer == pytest.approx(15.0 - 3 * 4.0)
    assert costs.dense == pytest.approx(15.0)
    buckets = TimestepBuckets.even(2)
    ratios = KeepRatios(tuple(BLOCKS), np.full((3, 2), 0.5))
    schedule = solve_schedule(ratios, costs, buckets, 0.5)  # outer 3 + blocks 4.5 = half of 15
    assert schedule.kept_tokens == dict.fromkeys(BLOCKS, (32, 32))
    assert schedule.reached == pytest.approx(0.5)
    assert schedule.metric == "latency"
    assert type(schedule).from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_an_unreachable_latency_names_the_smallest(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path
) -> None:
    times = {32: 1.5, 64: 4.0}
    path = written(tmp_path / "t.json", table, **with_times(table, times, dense=15.0))
    costs = budget_costs(cases("dit").routed, config_with(path))
    with pytest.raises(BudgetError, match="of the dense latency cannot be reached") as caught:
        check_budget(costs, 0.1)
    assert caught.value.smallest == pytest.approx(3 / 15)  # every block left out


@pytest.mark.parametrize("fit", ["measured", "isotonic"])
def test_fewer_tokens_may_take_longer(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path, fit: str
) -> None:
    """As measured, the solver never takes the slow level; a fit is asked for, never silent."""
    slow = {16: 3.0, 32: 1.0, 64: 4.0}
    path = written(tmp_path / "t.json", table, **with_times(table, slow, dense=15.0))
    assert read_latency_table(path).non_monotone() == BLOCKS
    levels = dict.fromkeys(BLOCKS, (16, 32, 64))
    routed = cases("dit").routed
    fingerprint = fingerprint_of(routed, block_groups(routed, levels))
    costs = latency_costs(read_latency_table(path), levels, fingerprint, fit)
    expected = (3.0, 1.0, 4.0) if fit == "measured" else (2.0, 2.0, 4.0)
    assert costs.per_level[BLOCKS[0]] == expected
    assert costs.dense == pytest.approx(15.0)
    penalties = {block: np.array([[0.5, 1.0, 0.0]]) for block in BLOCKS}
    budget = 0.61
    found = solve_least(penalties, costs, TimestepBuckets.even(1), budget)
    best = min(
        (
            choice
            for choice in itertools.product(range(3), repeat=3)
            if costs.outer + sum(expected[k] for k in choice) <= budget * 15
            and costs.outer + sum(expected[k] for k in choice) > budget * 15 * 0.98
        ),
        key=lambda choice: sum(penalties[BLOCKS[0]][0, k] for k in choice),
        default=None,
    )
    spent = cost_of(costs, found)
    assert spent <= budget * 15 + 1e-9
    if best is not None:
        picked = [levels[b].index(found.kept_tokens[b][0]) for b in BLOCKS]
        assert sum(penalties[BLOCKS[0]][0, k] for k in picked) == pytest.approx(
            sum(penalties[BLOCKS[0]][0, k] for k in best)
        )


def test_the_isotonic_fit_is_the_nearest_that_never_falls() -> None:
    """Against trying every non-falling vector on a grid."""
    values = np.array([3.0, 1.0, 2.0, 2.0])
    grid = [i / 4 for i in range(4, 13)]
    best = min(
        (c for c in itertools.product(grid, repeat=4) if list(c) == sorted(c)),
        key=lambda c: float(((np.array(c) - values) ** 2).sum()),
    )
    np.testing.assert_allclose(isotonic(values), best, atol=1 / 8)
    np.testing.assert_array_equal(isotonic(np.array([1.0, 2.0, 5.0])), [1.0, 2.0, 5.0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stable": False}, "not stable"),
        ({"dense_milliseconds": 1.0}, "longer than the whole model"),
        (
            {
                "check": {
                    "kept_tokens": {},
                    "predicted_milliseconds": 7.0,
                    "measured_milliseconds": 14.0,
                }
            },
            "took 200% of what they predict",
        ),
        ({"model": {"name": "x", "fingerprint": "y", "batch": 9}}, "measured on x at batch 9"),
    ],
)
def test_tables_that_do_not_serve_are_refused_in_words(
    cases: Callable[[str], Any],
    table: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    data = with_times(table, {32: 1.5, 64: 4.0}, dense=15.0)
    path = written(tmp_path / "t.json", table, **{**data, **changes})
    with pytest.raises(UsageError, match=words) as caught:
        budget_costs(cases("dit").routed, config_with(path))
    assert caught.value.code == "DCR-U061"


def test_other_levels_and_other_blocks_are_refused(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path
) -> None:
    data = with_times(table, {32: 1.5, 64: 4.0}, dense=15.0)
    path = written(tmp_path / "t.json", table, **data)
    finer = make_config(
        {
            "routing": {**ROUTING.model_dump(), "multiple_of": 16},
            "budget": {"metric": "latency", "table": str(path)},
        }
    )
    with pytest.raises(UsageError, match=r"not measured at \[16, 48\] kept tokens"):
        budget_costs(cases("dit").routed, finer)
    with pytest.raises(UsageError, match="its blocks are others"):
        budget_costs(cases("flux").routed, config_with(path))
    with pytest.raises(UsageError, match="does not exist"):
        budget_costs(cases("dit").routed, config_with(tmp_path / "nothing.json"))


def test_a_table_does_not_say_what_the_shortcut_of_a_skipped_block_takes(
    cases: Callable[[str], Any], table: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path / "t.json", table)
    routed = run_passes(cases("dit").captured, [InsertTokenRouters(shortcut_rank=2)])
    config = config_with(path)
    assert config.routing.skip_blocks
    with pytest.raises(UsageError, match=r"skip_blocks: false"):
        budget_costs(routed, config)
    # without skipping: refused as a table of another model, as it was measured without shortcuts
    whole = config.with_section(
        "routing", config.routing.model_copy(update={"skip_blocks": False}), "here"
    )
    with pytest.raises(UsageError, match="not those of this model"):
        budget_costs(routed, whole)


def test_metric_and_table_belong_together() -> None:
    for budget in ({"metric": "latency"}, {"table": "t.json"}):
        with pytest.raises(DiffCRError, match="belong together"):
            make_config({"budget": budget})


def test_without_a_table_the_budget_is_in_macs(cases: Callable[[str], Any]) -> None:
    config = make_config({"routing": ROUTING.model_dump()})
    routed = cases("dit").routed
    assert budget_costs(routed, config) == cost_table(routed, config.routing)


def test_a_calibration_meets_a_latency_budget_and_the_manifest_says_so(
    table: dict[str, Any], tmp_path: Path
) -> None:
    data = with_times(table, {32: 1.5, 64: 4.0}, dense=15.0)
    path = written(tmp_path / "t.json", table, **data)
    settings = {
        "routing": ROUTING.model_dump(),
        "rollouts": {"trajectories": 2, "steps": 4, "batch": 2},
        "calibration": {"steps": 4, "batch": 2, "train": "router"},
        "budget": {"metric": "latency", "table": str(path)},
    }
    routed = dcr.route(*models.tiny_dit(), ROUTING)
    result = dcr.calibrate(routed, budget="60%", config=make_config(settings))
    schedule = result.schedule
    spent = {0: 0.0, 32: 1.5, 64: 4.0}
    mean = sum(spent[k] for row in schedule.kept_tokens.values() for k in row) / 2
    assert (schedule.metric, schedule.reached) == ("latency", pytest.approx((3 + mean) / 15))
    assert schedule.reached <= 0.6
    assert result.history[-1]["reached"] <= 0.6
    artifact = dcr.export(dcr.freeze(routed, result), tmp_path / "out")
    assert artifact.manifest.budget == {
        "metric": "latency",
        "asked": 0.6,
        "reached": schedule.reached,
    }


def test_the_report_warns_of_tables_that_do_not_add_up() -> None:
    schedule = TokenSchedule(
        {"a": (32, 64)}, {"a": 64}, TimestepBuckets.even(2), 0.6, 0.6, "latency"
    )
    facts = {"check": 0.25, "non_monotone": ["a"], "fit": "measured"}
    found = " ".join(warnings_section(schedule, 0.6, facts))
    assert "125% of what the latency table predicts" in found
    assert "taken as they are" in found
    assert warnings_section(schedule, 0.6, {**facts, "check": 0.01, "non_monotone": []}) == []


def test_the_command_writes_a_table_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    line = f"bench python:tests.test_cli:tiny --table {path} --backend torch --threads 1 --rounds 7"
    sets = [f"--set routing.{key}" for key in ("multiple_of=32", "min_keep_ratio=0.25")]
    arguments = " ".join([line, *sets]).split()
    assert run(monkeypatch, *arguments) == 0
    assert read_latency_table(path).group_of().keys() == set(BLOCKS)
    assert "check at other kept tokens" in capsys.readouterr().out
    assert run(monkeypatch, "bench", str(tmp_path), "--set", "routing.buckets=2") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("out --device cuda --rounds 9", "--device, --rounds has no effect without --table or --kit"),
        ("demo --table t.json --steps 20", "--steps has no effect with --table or --kit"),
        ("demo --kit kit --loops 1", "--loops has no effect with --table or --kit"),
        ("demo --kit kit --threads 1 --backend torch", "--backend, --threads has no effect with --kit alone"),
        ("demo --table t.json --stability 0", "stability"),
    ],
)  # fmt: skip
def test_options_of_the_command_that_would_have_no_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    assert run(monkeypatch, "bench", *given.split()) == 2
    assert said in " ".join(capsys.readouterr().err.split())
