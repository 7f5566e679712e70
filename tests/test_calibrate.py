"""Ratios, warm start, rollouts and the loop."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

import diffcr_compile as dcr
from diffcr_compile.calibrate.data import (
    TeacherStates,
    batched_inputs,
    label_states,
    roll_out,
)
from diffcr_compile.calibrate.error_table import measure_errors, relative_errors
from diffcr_compile.calibrate.loop import run_calibration
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.calibrate.samplers import FlowEuler, SchedulerSampler
from diffcr_compile.calibrate.trained import TrainedParameters
from diffcr_compile.calibrate.warm_start import warm_start
from diffcr_compile.config import CalibrationConfig, CompileConfig, RolloutConfig, make_config
from diffcr_compile.errors import (
    ArtifactError,
    BudgetError,
    DiffCRError,
    ResourceError,
    UsageError,
)
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program, run_flat
from diffcr_compile.schedule import CostTable, TimestepBuckets, TokenSchedule, cost_of
from diffcr_compile.stages import teacher_states
from tests import models
from tests.conftest import keeping, routed_tiny_dit
from tests.model_parts import OwnDiT

BUCKETS = TimestepBuckets.even(2)
FAST = {"steps": 8, "batch": 4, "save_every": 2, "settle": 0.5, "ratios": "gradient"}


def labels(generator: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.randint(0, 10, (count,), generator=generator)}


@pytest.fixture(scope="module")
def states(cases) -> TeacherStates:
    config = RolloutConfig(trajectories=8, steps=4, batch=4)
    return roll_out(cases("dit").captured, FlowEuler(4), config, labels, seed=0)


def fresh() -> Program:
    return routed_tiny_dit().program


@functools.cache
def dit_costs(multiple_of: int, min_keep_ratio: float, skip_blocks: bool = False) -> CostTable:
    """Of the model that is calibrated here."""
    return measure_costs(fresh(), multiple_of, min_keep_ratio, skip_blocks=skip_blocks)


def calibrated(
    program: Program, states: TeacherStates, folder: Path | None = None, **options: object
):
    config = CalibrationConfig(**{**FAST, **options})
    costs = dit_costs(8, 0.25)
    return run_calibration(
        program, states, config, costs, BUCKETS, 0.6, folder=folder, key="k"
    )


# ------------------------------------------------------------------------------- rollouts


def test_rollout_is_the_samplers_trajectory(cases) -> None:
    """Against an Euler loop written out here."""
    program = cases("dit").captured
    config = RolloutConfig(trajectories=2, steps=3, batch=2)
    found = roll_out(program, FlowEuler(3), config, labels, seed=5)
    generator = torch.Generator().manual_seed(5 * 100_003)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    label = torch.randint(0, 10, (2,), generator=generator)
    model, _ = models.tiny_dit()
    row = 0
    with torch.no_grad():
        for t in (1.0, 2 / 3, 1 / 3):
            assert torch.equal(found.inputs["hidden_states"][row : row + 2], x)
            v = model(x, timestep=torch.full((2,), 1000 * t), class_labels=label).sample
            torch.testing.assert_close(
                found.target[row : row + 2], v, rtol=0, atol=1e-5
            )  # t in fp32
            x = x - found.target[row : row + 2] / 3
            row += 2


def test_rollout_shards_are_taken_up_again(cases, tmp_path: Path) -> None:
    program = cases("dit").captured
    config = RolloutConfig(trajectories=6, steps=2, batch=2)
    seen: list[tuple[str, int, int]] = []
    first = roll_out(program, FlowEuler(2), config, labels, 0, tmp_path)
    (tmp_path / "rollouts_0001.safetensors").unlink()
    again = roll_out(
        program, FlowEuler(2), config, labels, 0, tmp_path, lambda *event: seen.append(event)
    )
    assert torch.equal(first.target, again.target)
    assert seen == [("rollouts", i, 3) for i in (1, 2, 3)]


def test_a_diffusers_scheduler_is_a_sampler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = 5
    ours, theirs = (
        FlowEuler(steps),
        SchedulerSampler(FlowMatchEulerDiscreteScheduler(shift=1.0), steps),
    )
    x = torch.randn(2, 1, 4, 4)
    state = theirs.start(x)
    for index in range(steps):
        state = theirs.step(torch.ones_like(x), index, state)
    # Both integrate v = 1 over all of time; diffusers' grid ends at sigma 1/1000 before 0.
    torch.testing.assert_close(state, x - 1, rtol=0, atol=1e-5)
    assert len(theirs.timesteps) == len(ours.timesteps)


def test_a_scheduler_that_keeps_the_state_at_the_noises_scale(cases) -> None:
    """Euler in sigma space: the model must get the scaled state, as in the loop of diffusers' own pipelines."""
    from diffusers import EulerDiscreteScheduler

    case, steps, seed = cases("dit"), 3, 5
    config = RolloutConfig(trajectories=2, steps=steps, batch=2)
    found = roll_out(
        case.captured, SchedulerSampler(EulerDiscreteScheduler(), steps), config, labels, seed
    )

    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed * 100_003)
    state = torch.randn(2, 1, 16, 16, generator=generator) * scheduler.init_noise_sigma
    given = dict(labels(generator, 2))
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(state, timestep)
        times = torch.full((2,), float(timestep))
        with torch.no_grad():
            output = run_flat(
                case.captured, {**given, "hidden_states": scaled, "timestep": times}
            )[0]
        rows = slice(2 * step, 2 * step + 2)
        assert torch.equal(found.inputs["hidden_states"][rows], scaled)
        assert torch.equal(found.target[rows], output)
        state = scheduler.step(output, timestep, state).prev_sample
    # the state that it is made from is a hundred times as large
    assert 0.5 < float(found.inputs["hidden_states"][:2].std()) < 2


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_a_scheduler_that_draws_noise_is_refused(kind: str) -> None:
    import diffusers

    with pytest.raises(UsageError, match="draws noise in its steps"):
        SchedulerSampler(getattr(diffusers, kind)(), 3)


def test_own_data_is_answered_by_the_dense_model(cases) -> None:
    case = cases("dit")
    found = label_states(case.captured, [dict(case.captured.example)])
    assert torch.equal(found.target, run_flat(case.captured, case.captured.example)[0])
    assert found.timesteps.tolist() == [300.0, 700.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 1, 8, 8)}, "hidden_states has shape"),
        ({"hidden_states": torch.full((2, 1, 16, 16), math.nan)}, "NaN"),
        ({"timestep": None}, "lacks the inputs"),
    ],
)
def test_bad_data_is_refused(cases, change: dict, message: str) -> None:
    program = cases("dit").captured
    batch = {n: t for n, t in {**program.example, **change}.items() if t is not None}
    with pytest.raises(UsageError, match=message):
        label_states(program, [batch])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "conditions returned a NoneType"),
        ({}, r"lacks the inputs \['class_labels'\]"),
        ({"class_label": 1, "class_labels": 1}, r"the unknown \['class_label'\]"),
        ({"class_labels": [1, 2]}, "conditions: class_labels is a list"),
        ({"class_labels": torch.ones(2)}, "conditions: class_labels is torch.float32"),
        ({"class_labels": torch.ones(3, dtype=torch.int64)}, "has 3 rows, expected 2"),
    ],
    ids=["none", "missing", "unknown", "list", "type", "rows"],
)
def test_conditions_that_do_not_fit_are_told_in_words(cases, found, message: str) -> None:
    config = RolloutConfig(trajectories=2, batch=2)
    with pytest.raises(UsageError, match=message) as caught:
        roll_out(cases("dit").captured, FlowEuler(2), config, lambda *_: found, seed=0)
    assert caught.value.code == "DCR-U072"


class Numbered(Dataset[dict[str, Tensor]]):
    """Map-style: no ``__iter__``, and no IndexError at the end."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch, self.reads = batch, 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.reads += 1
        assert self.reads < 10
        return self.batch


def test_a_dataset_that_is_read_by_number_has_an_end(cases) -> None:
    program = cases("dit").captured
    batch = dict(program.example)
    assert torch.equal(
        label_states(program, Numbered(batch)).target,
        label_states(program, [batch] * 3).target,
    )


def test_memory_that_ends_while_data_are_answered_is_told_in_words(cases, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("diffcr_compile.stages.label_states", full)
    with pytest.raises(ResourceError, match="Lower the batch size of your data") as caught:
        teacher_states(cases("dit").routed, [], CompileConfig(), None, None, None, None)
    assert caught.value.code == "DCR-R010"


def test_empty_data_and_empty_buckets_are_refused(cases, states: TeacherStates) -> None:
    with pytest.raises(UsageError, match="empty"):
        label_states(cases("dit").captured, [])
    with pytest.raises(UsageError, match="no training state has a timestep"):
        states.by_bucket(TimestepBuckets((0.0, 1.0, 1000.0), (0.5, 0.5)))


def _batch(**change: object) -> dict[str, object]:
    good = {
        "hidden_states": torch.zeros(3, 1, 16, 16),
        "timestep": torch.tensor([1.0, 2.0, 3.0]),
        "class_labels": torch.tensor([0, 1, 2]),
    }
    return {**good, **change}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_batch(), "is a dict, expected several batches"),
        (torch.zeros(3, 1, 16, 16), "is a Tensor, expected several batches"),
        (5, "is a int, expected several batches"),
        ([torch.zeros(3, 1, 16, 16)], "batch 0 is a Tensor, expected a mapping"),
        ([_batch(hidden_states=np.zeros((3, 1, 16, 16)))], "is a ndarray, expected a tensor"),
        ([_batch(hidden_states=torch.zeros(3, 1, 16, 16).double())], r"is torch.float64, expected torch.float32"),
        ([_batch(hidden_states=torch.zeros(3, 1, 16, 16).half())], r"is torch.float16, expected torch.float32"),
        ([_batch(timestep=torch.tensor([1, 2, 3]).int())], "timestep is torch.int32, expected"),
        ([_batch(), _batch(timestep=torch.tensor([1.0]))], "batch 1 needs one batch size"),
        ([{n: t[:0] for n, t in _batch().items()}], "one batch size of at least 1"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused_in_words(cases, data: object, message: str) -> None:
    program = cases("dit").captured
    want = program.example["timestep"].dtype
    if isinstance(data, list):  # the model's own type, where it is not what the case is about
        for batch in data:
            t = batch.get("timestep") if isinstance(batch, dict) else None
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                batch["timestep"] = t.to(want)
    with pytest.raises(UsageError, match=message) as caught:
        label_states(program, data)
    assert caught.value.code == "DCR-U072"


class Styled(OwnDiT):
    """An input without a batch axis."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return super().forward(x + style[None, :, None, None], t)


class OneTime(OwnDiT):
    """One timestep for the whole batch."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t.expand(x.shape[0]))


def test_an_input_without_a_batch_axis_must_be_the_same_in_all_batches() -> None:
    inputs = {"x": torch.randn(3, 2, 6, 6), "t": torch.rand(3), "style": torch.ones(2)}
    program = dcr.route(Styled().eval(), inputs).program
    label_states(program, [inputs, dict(inputs)])
    with pytest.raises(UsageError, match="style has no batch axis and differs") as caught:
        label_states(program, [inputs, {**inputs, "style": torch.zeros(2)}])
    assert caught.value.code == "DCR-U072"


def test_one_timestep_for_all_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 2, 6, 6), "t": torch.tensor(0.5)}
    program = dcr.route(OneTime().eval(), inputs).program
    with pytest.raises(UsageError, match=r"has no batch axis.*one timestep per sample"):
        roll_out(program, FlowEuler(2, 1.0), RolloutConfig(), lambda *_: {}, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="has no batch axis"):
        label_states(program, [inputs])


def test_the_budget_is_met_over_the_steps_of_the_sampler(cases) -> None:
    """Of a shifted schedule half of the steps fall into the upper quarter of the timesteps."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = SchedulerSampler(scheduler, 20)
    config = make_config(
        {"routing": {"multiple_of": 2, "skip_blocks": True, "min_keep_ratio": 0.1},
         "rollouts": {"trajectories": 2, "batch": 2},
         "calibration": {"steps": 0, "train": "router", "batch": 2}}
    )  # fmt: skip
    result = dcr.calibrate(
        copy.deepcopy(cases("dit").routed).attached().module, budget="60%", config=config,
        sampler=sampler, conditions=labels,
    )  # fmt: skip
    schedule = result.schedule
    assert schedule.buckets.weights == (0.1, 0.15, 0.25, 0.5)
    per_bucket = [
        result.costs.outer
        + sum(result.costs.at(b, kept[i]) for b, kept in schedule.kept_tokens.items())
        for i in range(4)
    ]
    loop = [per_bucket[schedule.buckets.index_of(t)] for t in sampler.timesteps]
    assert sum(loop) / 20 / result.costs.dense == pytest.approx(schedule.reached)
    assert schedule.reached <= 0.6


# --------------------------------------------------------------------------------- ratios


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.35, 1.0))
def test_projection_meets_the_budget_within_the_range(cases, seed: int, budget: float) -> None:
    case = cases("dit")
    costs = dit_costs(8, 0.25)
    learner = RatioLearner(case.routed, costs, BUCKETS, two_bin=False)
    values = np.random.default_rng(seed).uniform(0.25, 1.0, learner.values.shape)
    learner.values = values
    learner.project(budget)
    assert np.all((learner.values >= 0.25) & (learner.values <= 1.0))
    assert learner.cost() == pytest.approx(budget, abs=1e-6)
    # one shift for all of equal cost: those that hit no wall have moved equally
    free = (learner.values > 0.25) & (learner.values < 1.0)
    shifts = (values - learner.values)[free]
    assert len(shifts) == 0 or np.ptp(shifts) < 1e-6


@pytest.mark.parametrize("per", ["block_and_bucket", "block"])
def test_ratios_rest_where_a_bit_of_cost_is_worth_equally_much_everywhere(
    cases, per: str
) -> None:
    """Blocks that cost differently, each with a loss of worth * (1 - ratio)^2 / 2.

    Lagrange: worth * (1 - ratio) = multiplier * slope of the cost, so with linear costs the answer is known.
    """
    levels, dearness = tuple(range(0, 65, 4)), np.array([1.0, 4.0, 2.0])
    names = [spec.name for spec in cases("dit").routed.blocks]
    assert len(names) == len(dearness)
    per_level = {n: tuple(d * k for k in levels) for n, d in zip(names, dearness, strict=True)}
    none = {name: (0.0,) * len(levels) for name in names}
    costs = CostTable(dict.fromkeys(names, levels), per_level, none, none, outer=0.0)
    learner = RatioLearner(cases("dit").routed, costs, BUCKETS, two_bin=False, per=per)
    worth = np.array([2.0, 4.0, 3.0])
    for step in range(400):
        bucket, per_bin = step % len(BUCKETS), levels[1] / levels[-1]
        learner.project(0.6)
        learner.attach(bucket)
        slopes = -worth * (1 - learner.values[:, bucket])
        for blend, slope in zip(learner.blends, slopes, strict=True):
            blend.grad = torch.tensor(float(slope * per_bin))
        learner.step(bucket, 0.04 * (1 - step / 400))
    learner.project(0.6)
    multiplier = 0.4 * dearness.sum() / (dearness**2 / worth).sum()
    expected = 1 - multiplier * dearness / worth
    assert np.all((expected > 0.2) & (expected < 0.9))  # no wall is in the way
    # The last steps are small, and of a common size: what is left is far below a level (1/16).
    assert np.abs(learner.values - expected[:, None]).max() < 0.01
    with keeping(cases("dit"), {}):
        pass  # the shared program keeps all tokens again


@pytest.mark.parametrize("per", ["bucket", "model"])
def test_blocks_that_share_a_ratio_are_shifted_alike_whatever_they_cost(
    cases, per: str
) -> None:
    case = cases("dit")
    costs = dit_costs(8, 0.25)
    first = case.routed.blocks[0].name
    dear = {**costs.per_level, first: tuple(5 * c for c in costs.per_level[first])}
    costs = dataclasses.replace(costs, per_level=dear)
    learner = RatioLearner(case.routed, costs, BUCKETS, two_bin=False, per=per)
    learner.project(0.7)
    assert np.ptp(learner.values) == 0
    assert learner.cost() == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("value", [0.25, 0.5, 0.6, 1.0])
def test_every_ratio_can_move_in_both_directions(
    cases, states: TeacherStates, value: float
) -> None:
    """At the walls and at bin values too, the gradient of each ratio is alive."""
    program = fresh()
    learner = RatioLearner(program, dit_costs(8, 0.25), BUCKETS, two_bin=False)
    learner.values[:] = value
    learner.attach(0)
    inputs, _ = states.take(torch.arange(4), frozenset(states.inputs))
    program.module.train()
    run_flat(program, inputs)[0].square().mean().backward()
    learner.step(0, lr=0.0)
    assert np.all(learner.momentum[:, 0] != 0)
    for direction in (-1, 1):
        learner.values[:] = value
        learner.momentum[:] = direction
        learner.step(0, lr=0.01)
        moved = learner.values[:, 0] - value
        wall = value == (0.25 if direction == 1 else 1.0)
        assert np.allclose(moved, 0 if wall else -0.01 * direction, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**16),
    st.floats(1e-4, 3.0),
    st.sampled_from(["block_and_bucket", "block", "bucket"]),
    st.booleans(),
)
def test_no_step_leaves_the_range_and_every_ratio_can_come_back(
    cases, seed: int, lr: float, per: str, skip: bool
) -> None:
    """Any gradients, any rate, walls included: in range after the step, and free to move afterwards."""
    case = cases("dit")
    costs = dit_costs(8, 0.25, skip_blocks=skip)
    learner = RatioLearner(case.routed, costs, BUCKETS, two_bin=False, per=per)
    lowest = learner.lowest[:, None]
    random = np.random.default_rng(seed)
    at_wall = random.choice([0.0, 0.3, 1.0], learner.values.shape)
    learner.values = np.clip(at_wall, lowest, 1.0)

    def step(gradients: np.ndarray, rate: float) -> None:
        for bucket in range(len(BUCKETS)):
            learner.attach(bucket)
            for blend, gradient in zip(learner._blends, gradients[:, bucket], strict=True):
                blend.grad = torch.tensor(float(gradient))
            learner.step(bucket, rate)

    step(random.normal(0, 10.0 ** random.integers(-8, 8), learner.values.shape), lr)
    assert np.all((learner.values >= lowest) & (learner.values <= 1))
    learner.project(0.6)
    assert np.all((learner.values >= lowest) & (learner.values <= 1))
    for direction in (-1.0, 1.0):
        before = learner.values.copy()
        learner.momentum[:] = 0
        step(np.full(before.shape, direction), 1e-3)
        wall = before == (lowest if direction > 0 else 1.0)
        assert np.all((np.sign(learner.values - before) == -direction) | wall)
        learner.values = before
    with keeping(case, {}):
        pass  # the shared program keeps all tokens again


@pytest.mark.parametrize(
    ("per", "axis"), [("block", 1), ("bucket", 0), ("block_and_bucket", None)]
)
def test_tied_ratios_stay_equal_and_the_others_do_not(
    states: TeacherStates, per: str, axis: int | None
) -> None:
    """-L and -T of the paper: after learning, real ratios differ only where they may."""
    result = calibrated(fresh(), states, ratios_per=per, steps=16)
    ratios = result.keep_ratios.values
    spreads = [np.ptp(ratios, axis=other).max() for other in (0, 1)]
    assert [spread > 1e-6 for spread in spreads] == [axis != 0, axis != 1]
    assert 0.6 * 0.98 <= result.schedule.reached <= 0.6


@pytest.mark.parametrize(
    "options", [{"ratios": "errors"}, {"ratios": "uniform"}, {"steps": 0}]
)
def test_only_ratios_that_are_learned_can_be_tied(options: dict) -> None:
    """Anything else would say one thing in the settings and do another."""
    with pytest.raises(UsageError, match="set ratios: gradient and steps above 0"):
        make_config({"calibration": {**FAST, **options, "ratios_per": "block"}})


@pytest.mark.parametrize(
    ("options", "happens"),
    [
        ({"ratios": "errors", "resolves": 2}, {2, 4}),
        ({"ratios": "errors"}, {4}),
        ({"ratios": "errors", "settle": 0.0}, set()),
        ({"ratios": "errors", "settle": 0.0, "resolves": 1}, None),
        ({"ratios": "errors", "settle": 1.0, "resolves": 1}, None),
        ({"ratios": "errors", "steps": 4, "resolves": 3}, None),
        ({"ratios": "gradient", "resolves": 1}, {4}),
        ({"ratios": "gradient"}, set()),
        ({"ratios": "gradient", "resolves": 2}, None),
        ({"ratios": "uniform", "resolves": 1}, None),
        ({"ratios": "uniform", "resolves": 0}, set()),
        ({"steps": 0}, set()),
        ({"steps": 0, "resolves": 1}, None),
    ],
)
def test_a_schedule_is_solved_again_as_often_as_asked_or_refused(
    options: dict, happens: set[int] | None
) -> None:
    """``FAST`` has 8 steps, of which half settle."""
    if happens is None:
        with pytest.raises(UsageError, match=r"resolves: .* it happens") as caught:
            make_config({"calibration": {**FAST, **options}})
        assert caught.value.code == "DCR-U010"
        return
    assert CalibrationConfig(**{**FAST, **options}).resolve_steps == happens


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    make_config({"calibration": {"seed": 2**32 - 1}})
    with pytest.raises(UsageError, match="seed"):
        make_config({"calibration": {"seed": 2**50}})


def test_gradient_of_a_ratio_is_the_slope_of_the_loss(states: TeacherStates) -> None:
    """Linear in the boundary weight, so a finite difference within a bin is exact."""
    program = fresh()
    costs = dit_costs(8, 0.25)
    learner = RatioLearner(program, costs, BUCKETS, two_bin=False)
    inputs, target = states.take(torch.arange(4), frozenset(states.inputs))
    program.module.eval()

    def loss_at(ratio: float, block: int) -> torch.Tensor:
        learner.values[:] = 0.55
        learner.values[block, 0] = ratio
        learner.attach(0)
        return run_flat(program, inputs)[0].double().sub(target).square().mean()

    for block, name in enumerate(learner.names):
        loss_at(0.55, block).backward()
        learner.momentum[:] = 0
        learner.step(0, lr=0.0)
        found = learner.momentum[block, 0] / 0.1  # one step of a mean with momentum 0.9
        with torch.no_grad():
            slope = (loss_at(0.55 + 2e-3, block) - loss_at(0.55 - 2e-3, block)) / 4e-3
        assert found == pytest.approx(slope.item(), rel=0.05, abs=1e-6), name


# ------------------------------------------------------------------------------ warm start


def test_warm_start_is_the_ridge_regression(states: TeacherStates) -> None:
    """Against numpy's least squares on rows collected by hand."""
    program = fresh()
    chosen = torch.arange(8)
    explained = warm_start(program, states, chosen, batch=4)
    rows, sizes = [], []
    block = program.module.get_submodule("transformer_blocks.1")

    def collect(_: object, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        x, y = args[0].double(), output.double()
        size = (y - x).norm(dim=2).log()
        rows.append((x - x.mean(1, keepdim=True)).flatten(0, 1))
        sizes.append((size - size.mean(1, keepdim=True)).flatten())

    handle = block.register_forward_hook(collect, with_kwargs=True)
    inputs, _ = states.take(chosen, frozenset(states.inputs))
    with torch.no_grad():
        run_flat(program, inputs)
    handle.remove()
    x, z = torch.cat(rows).numpy(), torch.cat(sizes).numpy()
    ridge = 1e-3 * np.mean(np.diag(x.T @ x))
    stacked = np.concatenate([x, math.sqrt(ridge) * np.eye(x.shape[1])])
    expected = np.linalg.lstsq(stacked, np.concatenate([z, np.zeros(x.shape[1])]), rcond=None)[
        0
    ]
    found = program.module.routers["transformer_blocks.1"].score.weight[0].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # stored in fp32
    assert 0 < explained["transformer_blocks.1"] <= 1


# ------------------------------------------------------------------------------------ loop


def test_calibration_learns_and_leaves_the_users_model_alone(states: TeacherStates) -> None:
    model, inputs = models.tiny_dit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    routed = dcr.route(model, inputs)
    result = calibrated(routed.program, states, steps=40, lr_weights=2e-3)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    losses = [record["loss"] for record in result.history]
    assert len(losses) == 40
    # The first steps keep nearly all tokens, so compare within the settled part.
    assert np.mean(losses[-6:]) < np.mean(losses[24:30])
    assert result.schedule.reached <= 0.6
    assert (
        cost_of(result.costs, result.schedule) / result.costs.dense == result.schedule.reached
    )


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "two_bin"},
        {"train": "router"},
        {"train": "ratio"},
        {"ratios": "uniform"},
        {"steps": 0},
        {"optimizer": "muon"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_every_mode_meets_the_budget(states: TeacherStates, options: dict) -> None:
    program = fresh()
    weights = {n: p.clone() for n, p in program.module.named_parameters() if "router" not in n}
    result = calibrated(program, states, **options)
    assert 0.6 * 0.98 <= result.schedule.reached <= 0.6
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in result.history)
    moved = any(
        not torch.equal(weights[n], p)
        for n, p in program.module.named_parameters()
        if n in weights
    )
    assert moved == (options.get("train", "all") == "all" and options.get("steps") != 0)
    ratios = result.keep_ratios.values
    assert (np.ptp(ratios) < 1e-9) == (options == {"ratios": "uniform"})


def test_routers_score_in_fp32_under_autocast() -> None:
    program = fresh()
    selector = next(m for n, m in program.module.named_modules() if n.endswith("_select"))
    tokens = torch.randn(2, selector.num_tokens, program.blocks[0].width)
    selector.keep(selector.num_tokens // 2)
    expected = selector(tokens).positions
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selector(tokens).positions, expected)


def test_muon_steps_the_matrices_of_routed_blocks_and_nothing_else() -> None:
    program = fresh()
    trained = TrainedParameters(program, CalibrationConfig(optimizer="muon"))
    adamw, muon = trained.optimizers
    names = {id(p): n for n, p in trained.parameters.items()}
    mine = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    blocks = tuple(spec.name + "." for spec in program.blocks)
    expected = {
        n for n, p in program.module.named_parameters() if n.startswith(blocks) and p.ndim == 2
    }
    assert mine == expected
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - expected


def test_paper_gate_trains() -> None:
    model, inputs = models.tiny_dit()
    routed = dcr.route(model, inputs, make_config({"routing": {"gate": "paper"}}).routing)
    config = RolloutConfig(trajectories=4, steps=4, batch=4)
    found = roll_out(fresh(), FlowEuler(4), config, labels, 0)
    result = calibrated(routed.program, found)
    assert result.schedule.reached <= 0.6


def test_interrupted_run_ends_like_an_uninterrupted_one(
    states: TeacherStates, tmp_path: Path
) -> None:
    whole = fresh()
    expected = calibrated(whole, states)

    class StopError(Exception):
        pass

    def stop(record: dict, _: int) -> None:
        if record["step"] == 5:
            raise StopError

    costs = dit_costs(8, 0.25)
    config = CalibrationConfig(**FAST)
    with pytest.raises(StopError):
        run_calibration(
            fresh(), states, config, costs, BUCKETS, 0.6, folder=tmp_path, key="k", report=stop
        )
    resumed = fresh()
    result = calibrated(resumed, states, tmp_path)
    assert result.schedule == expected.schedule
    assert [r["loss"] for r in result.history] == [r["loss"] for r in expected.history]
    pairs = zip(
        resumed.module.named_parameters(), whole.module.named_parameters(), strict=True
    )
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == config.steps
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["step"] == 1


def test_state_of_other_settings_is_not_taken_up(
    states: TeacherStates, tmp_path: Path
) -> None:
    first = calibrated(fresh(), states, tmp_path)
    costs = dit_costs(8, 0.25)
    config = CalibrationConfig(**{**FAST, "seed": 1})
    other = run_calibration(
        fresh(), states, config, costs, BUCKETS, 0.6, folder=tmp_path, key="other"
    )
    assert other.history[0]["loss"] != first.history[0]["loss"]


def test_damaged_state_is_refused(states: TeacherStates, tmp_path: Path) -> None:
    calibrated(fresh(), states, tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        calibrated(fresh(), states, tmp_path)


def test_impossible_budget_names_the_smallest(states: TeacherStates) -> None:
    program = fresh()
    costs = dit_costs(8, 0.25)
    with pytest.raises(BudgetError, match="smallest reachable budget is") as caught:
        run_calibration(program, states, CalibrationConfig(**FAST), costs, BUCKETS, 0.05)
    assert caught.value.smallest == pytest.approx(costs.smallest_budget())


def test_an_infinite_loss_stops_with_the_step(states: TeacherStates) -> None:
    broken = dataclasses.replace(states, target=torch.full_like(states.target, 1e30))
    with pytest.raises(DiffCRError, match="step 1: the loss is inf"):
        calibrated(fresh(), broken)


# ---------------------------------------------------------------------------- skipped blocks


@pytest.mark.parametrize("estimator", ["boundary", "two_bin"])
def test_a_budget_below_every_keep_ratio_skips_blocks(
    states: TeacherStates, estimator: str
) -> None:
    program = fresh()
    costs = dit_costs(8, 0.25, skip_blocks=True)
    floor = dit_costs(8, 0.25).smallest_budget()
    config = CalibrationConfig(**{**FAST, "estimator": estimator})
    result = run_calibration(program, states, config, costs, BUCKETS, 0.5 * floor)
    kept = [k for column in result.schedule.kept_tokens.values() for k in column]
    assert 0 in kept
    assert cost_of(costs, result.schedule) / costs.dense <= 0.5 * floor


def test_a_selector_that_keeps_nothing_leaves_the_block_out(cases) -> None:
    case = cases("dit")
    column = {name: 0 if number == 1 else 32 for number, name in enumerate(case.names)}
    with keeping(case, column), torch.no_grad():
        found = run_flat(case.routed, case.routed.example)[0]
    with torch.no_grad():
        expected = run_flat(case.frozen(column), case.routed.example)[0]
    # One token went through the block and back: x + (y - x) - (y - x) is x but for its last bit.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- the error table


def test_errors_are_what_a_model_with_fewer_tokens_makes(cases, states: TeacherStates) -> None:
    """Against frozen graphs of one routed block each."""
    case = cases("dit")
    costs = dit_costs(16, 0.25, skip_blocks=True)  # levels 0, 16, 32, 48, 64
    rows = [torch.arange(3), torch.arange(4, 8)]
    with keeping(case, {}):
        errors = measure_errors(case.routed, states, rows, costs)
    batched = batched_inputs(case.routed)
    for name in case.names:
        assert errors[name].shape == (2, 5)
        for bucket, chosen in enumerate(rows):
            inputs, answer = states.take(chosen, batched)
            for level, kept in enumerate(costs.levels[name]):
                frozen = case.frozen(
                    {other: kept if other == name else 64 for other in case.names}
                )
                with torch.no_grad():
                    found = run_flat(frozen, inputs)[0]
                expected = float((found - answer).square().mean())
                assert errors[name][bucket, level] == pytest.approx(
                    expected, rel=1e-3, abs=1e-9
                )
        assert np.all(
            errors[name][:, -1] < 1e-10
        )  # all kept: the dense model, but for rounding
        assert np.all(errors[name][:, 0] > 1e-6)


def test_what_comes_before_a_block_runs_once_for_all_of_its_levels(
    cases, states: TeacherStates
) -> None:
    case = cases("dit")
    costs = measure_costs(
        case.routed, 16, 0.25, skip_blocks=True
    )  # four levels and all tokens
    calls: collections.Counter[str] = collections.Counter()
    handles = [
        case.routed.module.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.update([name])
        )
        for name in case.names
    ]
    reported: list[tuple[int, int]] = []
    with keeping(case, {}):
        measure_errors(
            case.routed,
            states,
            [torch.arange(2)],
            costs,
            progress=lambda *now: reported.append(now),
        )
    for handle in handles:
        handle.remove()
    runs = 1 + 4 * len(case.names)
    assert reported == [(done, runs) for done in range(1, runs + 1)]
    for place, name in enumerate(case.names):
        on_the_way = place < len(case.names) - 1
        assert calls[name] == 1 + 4 * (place + 1) + on_the_way


def test_errors_around_a_schedule_leave_the_other_blocks_at_it(
    cases, states: TeacherStates
) -> None:
    """Against frozen graphs that keep what the schedule says but for one block."""
    case = cases("dit")
    costs = dit_costs(16, 0.25)  # levels 16, 32, 48, 64
    around = TokenSchedule(
        dict.fromkeys(case.names, (48, 16)), dict.fromkeys(case.names, 64), BUCKETS
    )
    rows = [torch.arange(3), torch.arange(4, 8)]
    with keeping(case, {}):
        errors = measure_errors(case.routed, states, rows, costs, around)
    for name in case.names:
        for bucket, chosen in enumerate(rows):
            inputs, answer = states.take(chosen, batched_inputs(case.routed))
            for level, kept in enumerate(costs.levels[name]):
                column = {**around.column(bucket), name: kept}
                with torch.no_grad():
                    found = run_flat(case.frozen(column), inputs)[0]
                expected = float((found - answer).square().mean())
                assert errors[name][bucket, level] == pytest.approx(expected, rel=1e-3)


def test_the_schedule_is_solved_again_over_the_errors_of_the_trained_model(
    states: TeacherStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 steps 6 come before the settling; two more solves fall on steps 3 and 6."""
    asked: list[tuple[int, TokenSchedule | None]] = []
    run: list[int] = []

    def watched(program, states, chosen, costs, around, progress):
        asked.append((len(run), around))
        return measure_errors(program, states, chosen, costs, around, progress)

    monkeypatch.setattr("diffcr_compile.calibrate.ratio_search.measure_errors", watched)
    program = fresh()
    config = CalibrationConfig(
        **{**FAST, "steps": 10, "settle": 0.4, "ratios": "errors", "resolves": 2}
    )
    result = run_calibration(
        program,
        states,
        config,
        dit_costs(8, 0.25),
        BUCKETS,
        0.6,
        report=lambda record, _: run.append(int(record["step"])),
    )
    assert [done for done, _ in asked] == [0, 3, 6]
    assert asked[0][1] is None
    assert asked[1][1] is not None
    assert 0.6 * 0.98 <= result.schedule.reached <= 0.6


def test_large_errors_of_a_bucket_weigh_no_more_than_small_ones() -> None:
    flat = dict.fromkeys("ab", (0.0,) * 3)
    costs = CostTable(dict.fromkeys("ab", (0, 32, 64)), flat, flat, flat, outer=0.0)
    small = {"a": np.array([4.0, 2.0, 0.0]), "b": np.array([8.0, 6.0, 0.0])}
    errors = {name: np.stack([row, 100 * row]) for name, row in small.items()}
    found = relative_errors(errors, costs)
    assert found["a"] == pytest.approx(np.array([[1.0, 0.5, 0.0]] * 2))
    assert found["b"] == pytest.approx(np.array([[2.0, 1.5, 0.0]] * 2))


def test_the_schedule_over_errors_is_the_best_of_all(states: TeacherStates) -> None:
    """Against trying every schedule of one bucket."""
    program = fresh()
    buckets = TimestepBuckets.even(1)
    costs = dit_costs(32, 0.25, skip_blocks=True)  # 3 blocks, 3 levels
    config = CalibrationConfig(**{**FAST, "ratios": "errors", "steps": 0})
    result = run_calibration(program, states, config, costs, buckets, 0.6)
    generator = torch.Generator().manual_seed(0)
    rows = states.by_bucket(buckets)[0]
    chosen = rows[torch.randint(len(rows), (config.batch,), generator=generator)]
    errors = measure_errors(program, states, [chosen], costs)
    names = list(errors)

    def cost(levels: tuple[int, ...]) -> float:
        macs = sum(costs.per_level[n][k] for n, k in zip(names, levels, strict=True))
        return (costs.outer + macs) / costs.dense

    errors = {n: e / np.median([x[0, 1] for x in errors.values()]) for n, e in errors.items()}
    best = min(
        (
            levels
            for levels in itertools.product(range(3), repeat=3)
            if 0.6 * 0.99 < cost(levels) <= 0.6
        ),
        key=lambda levels: sum(errors[n][0, k] for n, k in zip(names, levels, strict=True)),
        default=None,
    )
    found = tuple(costs.levels[n].index(result.schedule.kept_tokens[n][0]) for n in names)
    every = sorted(cost(levels) for levels in itertools.product(range(3), repeat=3))
    if best is None:  # nothing within one percent: the dearest that fits
        assert cost(found) == max(c for c in every if c <= 0.6)
    else:
        assert found == best
    assert result.schedule.reached <= 0.6


def test_an_interrupted_run_over_errors_ends_like_an_uninterrupted_one(
    states: TeacherStates, tmp_path: Path
) -> None:
    options = {"ratios": "errors", "resolves": 1}
    whole, parts = fresh(), fresh()
    expected = calibrated(whole, states, tmp_path / "whole", **options)

    class StopError(Exception):
        pass

    def stop(record: dict, _: int) -> None:
        if record["step"] == 5:
            raise StopError

    config = CalibrationConfig(**{**FAST, **options})
    costs = dit_costs(8, 0.25)
    folder = tmp_path / "parts"
    with pytest.raises(StopError):
        run_calibration(
            parts, states, config, costs, BUCKETS, 0.6, folder=folder, key="k", report=stop
        )
    again = fresh()
    found = calibrated(again, states, folder, **options)
    assert found.schedule == expected.schedule
    for one, two in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_way_to_a_schedule_costs_what_was_asked(states: TeacherStates) -> None:
    program = fresh()
    costs = dit_costs(8, 0.25, skip_blocks=True)
    learner = RatioLearner(program, costs, BUCKETS, two_bin=False)
    target = np.array([[1.0, 1.0], [0.0, 0.5], [0.25, 1.0]])
    end = learner.cost(target)
    for budget in (1.0, 0.5 + end / 2, end):
        learner.approach(target, budget)
        assert learner.cost() == pytest.approx(budget, abs=1e-6)
        assert np.all(learner.values >= target - 1e-9)
        assert np.all(learner.values[target == 1.0] == 1.0)
    np.testing.assert_allclose(learner.values, target, atol=1e-6)
