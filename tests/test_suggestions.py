"""Budgets compared without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import diffcr_compile as dcr
from diffcr_compile.budgets import cost_table
from diffcr_compile.calibrate.data import TeacherStates, label_states
from diffcr_compile.config import make_config
from diffcr_compile.errors import UsageError
from diffcr_compile.program import run_flat
from diffcr_compile.schedule import TimestepBuckets
from diffcr_compile.suggestions import (
    Option,
    Suggestion,
    compare_budgets,
    split_states,
)
from tests import models
from tests.model_parts import randn
from tests.test_cli import run

CONFIG = make_config(
    {
        "routing": {"buckets": 2, "multiple_of": 16, "min_keep_ratio": 0.25},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"batch": 4},
    }
)
BUCKETS = TimestepBuckets.even(2)


def states_for(program: Any) -> TeacherStates:
    timesteps = torch.linspace(50, 950, 12)
    batch = {
        "hidden_states": randn(12, 1, 16, 16, seed=5),
        "timestep": timesteps,
        "class_labels": torch.arange(12) % 10,
    }
    return label_states(program, [batch])


@pytest.fixture(scope="module")
def compared() -> tuple[Any, TeacherStates, Suggestion]:
    program = dcr.route(*models.tiny_dit()).program
    states = states_for(program)
    costs = cost_table(program, CONFIG.routing)
    budgets = (1.0, 0.8, 0.6, 0.05)
    return program, states, compare_budgets(program, states, CONFIG, costs, BUCKETS, budgets)


def test_measured_errors_are_those_of_the_frozen_graphs(
    compared: tuple[Any, TeacherStates, Suggestion],
) -> None:
    program, states, found = compared
    _, unseen = split_states(states.by_bucket(BUCKETS), 4, CONFIG.calibration.seed)
    for option in found.options[1:]:
        expected = 0.0
        # one graph per bucket also where neighbours are equal: freeze a bucket at a time
        for bucket, rows in enumerate(unseen):
            column = {b: (k[bucket],) for b, k in option.schedule.kept_tokens.items()}
            alone = type(option.schedule)(
                column, option.schedule.num_tokens, TimestepBuckets.even(1)
            )
            (graph,) = dcr.freeze(program.module, schedule=alone)
            inputs = {name: tensor[rows] for name, tensor in states.inputs.items()}
            with torch.no_grad():
                (output,) = run_flat(graph.program, inputs)
            error = (output - states.target[rows]).square().mean()
            expected += 0.5 * float(error / states.target[rows].square().mean())
        assert option.measured_error == pytest.approx(expected, rel=1e-3)
        assert option.cost <= option.schedule.asked


def test_options_run_from_no_error_to_the_smallest_budget(
    compared: tuple[Any, TeacherStates, Suggestion],
) -> None:
    _, _, found = compared
    assert [option.schedule.asked for option in found.options] == [1.0, 0.8, 0.6]
    assert found.options[0].measured_error < 1e-10
    assert found.options[0].predicted_error < 1e-10
    assert 0 < found.options[1].predicted_error < found.options[2].predicted_error
    assert found.unreachable == (0.05,)
    assert 0.05 < found.smallest < 0.6


def test_states_to_learn_from_and_to_check_with_are_not_the_same() -> None:
    rows = [torch.arange(0, 20), torch.arange(20, 23)]
    seen, unseen = split_states(rows, 4, seed=0)
    assert [len(r) for r in seen] == [4, 1]
    assert [len(r) for r in unseen] == [4, 2]
    for one, other, every in zip(seen, unseen, rows, strict=True):
        assert not set(one.tolist()) & set(other.tolist())
        assert set(one.tolist()) | set(other.tolist()) <= set(every.tolist())
    with pytest.raises(UsageError, match="at least 2 are needed"):
        split_states([torch.arange(1)], 4, seed=0)


def option(cost: float, error: float) -> Option:
    return Option(
        dcr.TokenSchedule({}, {}, TimestepBuckets.even(1), asked=cost, reached=cost),
        error,
        error,
    )


def test_the_knee_is_where_errors_begin_to_rise_faster_than_costs_fall() -> None:
    curve = [(0.9, 0.01), (0.8, 0.02), (0.6, 0.05), (0.5, 0.4), (0.4, 1.0)]
    found = Suggestion(tuple(option(*p) for p in curve), (), 0.4, "macs", 1)
    assert found.knee.cost == 0.6
    ahead = [(1 - c) / 0.6 - e for c, e in curve]
    assert found.options.index(found.knee) == int(np.argmax(ahead))


def test_no_reachable_budget_is_an_error_that_names_the_smallest(
    cases: Callable[[str], Any],
) -> None:
    program = cases("dit").routed
    costs = cost_table(program, CONFIG.routing)
    with pytest.raises(UsageError, match="is the smallest reachable") as caught:
        compare_budgets(program, states_for(program), CONFIG, costs, BUCKETS, (0.01,))
    assert caught.value.code == "DCR-U063"


def test_the_command_prints_its_table_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = "routing.buckets=2 routing.multiple_of=16 rollouts.trajectories=4 rollouts.steps=4"
    options = [part for each in sets.split() for part in ("--set", each)]
    line = (
        "suggest",
        "python:tests.test_cli:tiny",
        "--budgets",
        "90%,60%",
        "--json",
        *options,
    )
    assert run(monkeypatch, *line) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["budget"] for row in found["options"]] == [0.9, 0.6]
    assert found["knee"] in (0.9, 0.6)
    assert all(row["reached"] <= row["budget"] for row in found["options"])
    assert run(monkeypatch, *line, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 3


@pytest.mark.parametrize("what", ["substeps", "true_share"])
def test_answers_that_are_not_the_dense_models_are_refused(what: str) -> None:
    """With all tokens kept there would be an error."""
    model, inputs = models.plain()
    settings, data = {"rollouts": {"substeps": 2 if what == "substeps" else 1}}, None
    if what == "true_share":
        data = dcr.LatentStates(
            [], diffusers.FlowMatchEulerDiscreteScheduler(), "flow", true_share=0.5
        )
    with pytest.raises(UsageError, match=f"{what} = .* is for a calibration"):
        dcr.suggest(model, inputs, data=data, config=make_config(settings))
