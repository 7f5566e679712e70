"""What ``benchmarks/held_out_error`` counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import diffcr_compile as dcr
from benchmarks.held_out_error import (
    BY_ERRORS,
    BY_GRADIENT,
    MERGED,
    OURS,
    RESULTS,
    SMOKE,
    WITH_SKIPPING,
    Scale,
    error,
    recorded,
    summary,
)
from diffcr_compile.calibrate.data import TeacherStates
from diffcr_compile.program import run_flat
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from tests import models
from tests.conftest import routed_tiny_dit


def test_the_error_is_summed_over_the_graph_of_each_states_bucket() -> None:
    _, inputs = models.tiny_dit()
    routed = routed_tiny_dit()
    names = [spec.name for spec in routed.program.blocks]
    every = {spec.name: spec.num_tokens for spec in routed.program.blocks}
    kept = {
        name: (every[name] // 2, every[name]) for name in names
    }  # the noisier bucket keeps all
    frozen = dcr.freeze(routed, schedule=TokenSchedule(kept, every, TimestepBuckets.even(2)))
    batch = 4
    states = {
        "hidden_states": torch.randn(batch, *inputs["hidden_states"].shape[1:]),
        "timestep": torch.tensor([100.0, 900.0, 800.0, 300.0]),
        "class_labels": torch.arange(batch),
    }
    with torch.no_grad():
        target = run_flat(routed.program, states)[0]
        low = run_flat(frozen[0].program, states)[0]
    found = error(frozen, TeacherStates(states, target, states["timestep"]))
    off = (low - target)[[0, 3]].square().sum()  # the two states of the compressed bucket
    assert off > 0
    # sums of float32 in another order
    assert found == pytest.approx(float(off / target.square().sum()), rel=1e-3)


def test_variants_are_compared_seed_by_seed_with_each_of_ours() -> None:
    def runs(**errors: tuple[float, ...]) -> list[dict]:
        names = {"gradient": BY_GRADIENT, "errors": BY_ERRORS, "other": "other"}
        return [
            {"variant": names[name], "seed": seed, "error": error}
            for name, found in errors.items()
            for seed, error in enumerate(found)
        ]

    once_better = summary(runs(gradient=(1.0, 3.0), errors=(1.0, 2.0), other=(2.0, 2.5)))
    against = once_better["other"]["against"]
    assert not against[BY_GRADIENT]["worse_with_every_seed"]
    assert against[BY_GRADIENT]["ratio"] == pytest.approx((2 + 2.5 / 3) / 2)
    assert against[BY_ERRORS]["worse_with_every_seed"]
    assert set(once_better[BY_GRADIENT]["against"]) == {BY_ERRORS}
    always = summary(runs(gradient=(1.0, 3.0), other=(1.5, 3.5)))["other"]
    assert always["against"][BY_GRADIENT]["worse_with_every_seed"]  # though the ranges overlap
    assert set(always["against"]) == {BY_GRADIENT}  # the other was not run
    assert (always["min"], always["max"], always["mean"]) == (1.5, 3.5, 2.5)


def test_a_record_goes_on_only_under_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert recorded(path, SMOKE) == {}
    data = {
        "scale": dataclasses.asdict(SMOKE),
        "budgets": {"0.6": {"summary": {"old": 1}, "runs": [{"variant": "x", "seed": 0}]}},
    }
    path.write_text(json.dumps(data))
    assert recorded(path, SMOKE) == {"0.6": {"runs": [{"variant": "x", "seed": 0}]}}
    assert recorded(path, Scale()) == {}


@pytest.mark.parametrize("budget", ["0.6", "0.42"])
def test_with_measured_errors_ours_is_better_than_every_control_by_more_than_the_spread(
    budget: str,
) -> None:
    """Of the committed record, three seeds."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["budgets"][budget]
    assert len(found["runs"]) == 3 * len(found["summary"])
    assert found["summary"] == summary(found["runs"])
    controls = set(found["summary"]) - set(OURS)
    assert {MERGED, "blocks dropped", "random router", "two bins"} < controls
    # at 60 % one seed without skipping is worse than the best of the dropped blocks
    for ours in (WITH_SKIPPING, *([BY_ERRORS] if budget == "0.42" else [])):
        worst = found["summary"][ours]["max"]
        assert all(found["summary"][name]["min"] > worst for name in controls)
