"""Targets that stand for several steps of the dense model, against slow loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile.calibrate.data import roll_out
from diffcr_compile.calibrate.samplers import FlowEuler, SchedulerSampler, divided
from diffcr_compile.config import RolloutConfig, make_config
from diffcr_compile.errors import UsageError
from diffcr_compile.program import run_flat
from diffcr_compile.summary import steps_warning
from tests import models

STEPS, SUBSTEPS = 3, 4
# float32; a target is a difference of two states, divided by a step of about a third
CLOSE = 2e-4


def labels(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    return {"class_labels": torch.randint(10, (count,), generator=generator)}


def settings(substeps: int, **changes: Any) -> RolloutConfig:
    return RolloutConfig(trajectories=2, batch=2, steps=STEPS, substeps=substeps, **changes)


def ddim(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def euler(steps: int) -> EulerDiscreteScheduler:
    """It keeps its states on the scale of the noise."""
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


def velocity(program: Any, state: Tensor, timestep: float, label: Tensor) -> Tensor:
    inputs = {"hidden_states": state, "class_labels": label}
    inputs["timestep"] = torch.full((len(state),), timestep).to(program.example["timestep"])
    with torch.no_grad():
        return run_flat(program, inputs)[0]


def test_the_targets_are_mean_velocities_of_a_slow_loop(cases: Callable[[str], Any]) -> None:
    program = cases("dit").captured
    found = roll_out(program, FlowEuler(STEPS), settings(SUBSTEPS), labels, seed=5)
    times = [1000.0] * 2 + [1000 * 2 / 3] * 2 + [1000 / 3] * 2
    assert found.timesteps.tolist() == pytest.approx(times)
    state = found.inputs["hidden_states"][:2]
    label = found.inputs["class_labels"][:2]
    fine = STEPS * SUBSTEPS
    for step in range(STEPS):
        rows = slice(2 * step, 2 * step + 2)
        torch.testing.assert_close(found.inputs["hidden_states"][rows], state)
        mean = torch.zeros_like(state)
        for substep in range(SUBSTEPS):
            t = 1 - (step * SUBSTEPS + substep) / fine
            said = velocity(program, state, 1000 * t, label)
            mean += said / SUBSTEPS
            state = state - said / fine
        torch.testing.assert_close(found.target[rows], mean, rtol=CLOSE, atol=CLOSE)


def test_a_shifted_flow_scheduler_is_divided_between_its_own_noise_levels(
    cases: Callable[[str], Any],
) -> None:
    program = cases("dit").captured
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = SchedulerSampler(scheduler, STEPS)
    found = roll_out(program, sampler, settings(SUBSTEPS), labels, seed=5)
    levels = scheduler.sigmas.tolist()
    state, label = found.inputs["hidden_states"][:2], found.inputs["class_labels"][:2]
    assert found.timesteps[::2].tolist() == pytest.approx([1000 * s for s in levels[:-1]])
    for substep in range(SUBSTEPS):
        width = (levels[1] - levels[0]) / SUBSTEPS
        sigma = levels[0] + substep * width
        state = state + width * velocity(program, state, 1000 * sigma, label)
    torch.testing.assert_close(
        found.inputs["hidden_states"][2:4], state, rtol=CLOSE, atol=CLOSE
    )


@pytest.mark.parametrize("make", [ddim, euler])
def test_one_step_with_the_target_leads_where_the_dense_model_gets_in_four(
    cases: Callable[[str], Any], make: Callable[[int], Any]
) -> None:
    program = cases("dit").captured
    found = roll_out(
        program, SchedulerSampler(make(STEPS), STEPS), settings(SUBSTEPS), labels, seed=5
    )
    given, label = found.inputs["hidden_states"].split(2), found.inputs["class_labels"][:2]
    fine, coarse = make(STEPS * SUBSTEPS), make(STEPS)
    state = given[0] / fine.scale_model_input(torch.ones(1), fine.timesteps[0])
    for step, target in enumerate(found.target.split(2)):
        timestep = coarse.timesteps[step]
        torch.testing.assert_close(
            given[step], coarse.scale_model_input(state, timestep), rtol=CLOSE, atol=CLOSE
        )
        reached = coarse.step(target, timestep, state).prev_sample
        for moment in fine.timesteps[step * SUBSTEPS : (step + 1) * SUBSTEPS]:
            said = velocity(
                program, fine.scale_model_input(state, moment), float(moment), label
            )
            state = fine.step(said, moment, state).prev_sample
        torch.testing.assert_close(reached, state, rtol=CLOSE, atol=CLOSE)


def test_with_one_substep_nothing_changes(cases: Callable[[str], Any]) -> None:
    program = cases("dit").captured
    one = roll_out(program, FlowEuler(STEPS), settings(1), labels, seed=5)
    plain = RolloutConfig(trajectories=2, batch=2, steps=STEPS)
    two = roll_out(program, FlowEuler(STEPS), plain, labels, seed=5)
    assert torch.equal(one.target, two.target)
    first = velocity(
        program, one.inputs["hidden_states"][:2], 1000.0, one.inputs["class_labels"][:2]
    )
    assert torch.equal(one.target[:2], first)


def test_levels_are_divided_evenly() -> None:
    assert divided(torch.tensor([1.0, 0.5, 0.0]), 2).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


class Own:
    """A user's sampler, which knows nothing of finer steps."""

    timesteps = (1000.0, 500.0)

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        return state - output / 2


class Clipping(FlowEuler):
    def step(self, output: Tensor, index: int, state: Tensor) -> Tensor:
        return super().step(output, index, state).clamp(-0.1, 0.1)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (Own(), r"Own has no refined\(substeps\)"),
        (Clipping(STEPS), "a step of Clipping is not linear"),
        (SchedulerSampler(DPMSolverMultistepScheduler(timestep_spacing="trailing"), STEPS), "remembers"),
        (SchedulerSampler(DDIMScheduler(timestep_spacing="linspace"), STEPS), "does not pass through"),
        # its timesteps are a quarter of a logarithm, and lie closer together than whole numbers
        (SchedulerSampler(EDMEulerScheduler(), STEPS), "does not pass through"),
        (SchedulerSampler(DEISMultistepScheduler(solver_order=1, use_flow_sigmas=True), STEPS), "does not pass through"),
    ],
    ids=["own", "clipping", "multistep", "spacing", "edm", "flow-sigmas"],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(
    cases: Callable[[str], Any], sampler: Any, said: str
) -> None:
    program = cases("dit").captured
    with pytest.raises(UsageError, match=said) as error:
        roll_out(program, sampler, settings(SUBSTEPS), labels, seed=0)
    assert error.value.code == "DCR-U076"
    assert "rollouts.substeps to 1" in str(error.value)


def test_data_of_ones_own_have_no_smaller_steps(cases: Callable[[str], Any]) -> None:
    """Silently training on something else is the worst that could happen."""
    config = make_config({"rollouts": {"substeps": 2}})
    routed = cases("dit").routed
    with pytest.raises(UsageError, match="data of your own are learned from instead"):
        dcr.calibrate(routed.module, [routed.example], budget="75%", config=config)


@pytest.mark.parametrize("calibration", [{"train": "router"}, {"steps": 0}], ids=str)
def test_larger_steps_ask_for_weights_that_learn(calibration: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"rollouts.substeps above 1 asks weights") as error:
        make_config({"rollouts": {"substeps": 2}, "calibration": calibration})
    assert error.value.code == "DCR-U010"


def test_a_model_learns_to_take_one_step_for_several(cases: Callable[[str], Any]) -> None:
    """At a budget that compresses nothing: what is left of the error of large steps, on noise that was not seen."""
    program = cases("dit").captured
    steps, substeps = 2, 8
    config = make_config(
        {
            "routing": {"buckets": 1},
            "rollouts": {
                "trajectories": 32,
                "batch": 32,
                "steps": steps,
                "substeps": substeps,
            },
            "calibration": {"steps": 60, "batch": 16, "ratios": "uniform", "ema": 0.9},
        }
    )
    routed = dcr.route(*models.tiny_dit(), config.routing)
    result = dcr.calibrate(routed, None, budget=0.999, config=config, conditions=labels)
    graph = dcr.freeze(routed, result)[0]
    generator = torch.Generator().manual_seed(77)
    noise = torch.randn(2, *program.example["hidden_states"].shape[1:], generator=generator)
    label = torch.tensor([1, 2])

    def sampled(model: Any, count: int) -> Tensor:
        state = noise
        for step in range(count):
            state = state - velocity(model, state, 1000 * (1 - step / count), label) / count
        return state

    wanted = sampled(program, steps * substeps)
    before = (sampled(program, steps) - wanted).square().mean()
    after = (sampled(graph.program, steps) - wanted).square().mean()
    assert after < before / 2


def test_a_finer_sampler_is_the_same_one_with_more_steps() -> None:
    assert dcr.FlowEuler(4).refined(3).timesteps == dcr.FlowEuler(12).timesteps


def test_the_report_says_how_many_steps_it_is_for() -> None:
    assert steps_warning(RolloutConfig()) == []
    (said,) = steps_warning(RolloutConfig(steps=8, substeps=4))
    assert "in 8 steps, each of which stands for 4" in said
