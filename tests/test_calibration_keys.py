"""What lies in a folder is taken up by the calibration that it belongs to, and by no other."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile import resumable
from diffcr_compile.calibrate.samplers import FlowSteps, SchedulerSampler, sampler_identity
from diffcr_compile.calibrate.shards import made_in_shards
from diffcr_compile.calibration_keys import calibration_settings, states_identity
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.program import DiTGraph
from diffcr_compile.workspace import Workspace
from tests.model_parts import OwnDiT, inputs_for


class Stop(Exception):  # noqa: N818 - an interruption, no error
    pass


def settings(**more: dict[str, Any]) -> CompileConfig:
    sections: dict[str, dict[str, Any]] = {
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 2},
        "calibration": {"steps": 3, "batch": 2, "train": "router", "save_every": 1},
    }
    return make_config({n: {**sections.get(n, {}), **more.get(n, {})} for n in {*sections, *more}})  # fmt: skip


def model(seed: int = 0) -> OwnDiT:
    made = OwnDiT().eval()
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in made.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return made


@functools.cache
def routed(seed: int) -> DiTGraph:
    return dcr.route(model(seed), inputs_for(), settings().routing)


def fresh(seed: int) -> DiTGraph:
    """A routed graph that a test may train."""
    module = copy.deepcopy(routed(seed))
    return dataclasses.replace(routed(seed).program, module=module).attached().module


def stop_at(wanted: str, number: int) -> Any:
    def progress(stage: str, done: int, *_: Any) -> None:
        if (stage, done) == (wanted, number):
            raise Stop

    return progress


def compiled(out: Path, config: CompileConfig | None = None, **options: Any) -> dict[str, Tensor]:  # fmt: skip
    given = {"budget": "80%", "until": "calibrate", **options}
    dcr.compile(
        model(), out, example_inputs=inputs_for(), config=config or settings(), **given
    )
    return load_file(out / "model/routed.safetensors")


def calibrated(folder: Path, seed: int = 0, **options: Any) -> tuple[Any, list[int]]:
    """A calibration in a folder, and the steps that it ran."""
    steps: list[int] = []
    given = {"budget": "80%", "config": settings(), **options}
    result = dcr.calibrate(
        fresh(seed),
        folder=folder,
        progress=lambda stage, done, *_: steps.append(done) if stage == "calibrate" else None,
        **given,
    )
    return result, steps


def timesteps_in(folder: Path, shard: int = 0) -> set[float]:
    found = load_file(folder / f"rollouts_{shard:04d}.safetensors")["timesteps"]
    return {round(t, 4) for t in found.tolist()}


# --------------------------------------------------------------------------------- dcr.calibrate


def test_a_calibration_in_a_folder_is_that_of_its_own_budget_and_settings(
    tmp_path: Path,
) -> None:
    calibrated(tmp_path, budget="90%")
    result, steps = calibrated(tmp_path)
    assert result.schedule.asked == 0.8
    assert steps == [1, 2, 3]
    assert calibrated(tmp_path)[1] == []  # the very same is taken up
    assert calibrated(tmp_path, config=settings(calibration={"lr_router": 1e-2}))[1]
    assert calibrated(tmp_path, key="other")[1]
    assert calibrated(tmp_path, key="other")[1] == []


def test_rollouts_in_a_folder_are_those_of_the_model_and_the_settings(tmp_path: Path) -> None:
    calibrated(tmp_path)
    first = load_file(tmp_path / "rollouts_0000.safetensors")["target"]
    calibrated(tmp_path, budget="90%")
    assert torch.equal(load_file(tmp_path / "rollouts_0000.safetensors")["target"], first)
    calibrated(tmp_path, seed=1)
    assert not torch.equal(load_file(tmp_path / "rollouts_0000.safetensors")["target"], first)
    calibrated(tmp_path, config=settings(rollouts={"steps": 8}))
    assert len(timesteps_in(tmp_path)) == 8


def test_shards_of_another_key_are_deleted_and_those_of_the_same_are_not(
    tmp_path: Path,
) -> None:
    made: list[int] = []

    def shard(number: int) -> dict[str, Tensor]:
        made.append(number)
        return {"n": torch.tensor([number])}

    for key in ("one", "one", "two", "one"):
        made_in_shards(2, shard, tmp_path, key=key)
    assert made == [0, 1] * 3


# ----------------------------------------------------------------------------------- dcr.compile


def test_settings_that_were_interrupted_in_between_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    """A in the calibration, B in the rollouts, A again."""
    expected = compiled(tmp_path / "reference")
    other = settings(rollouts={"steps": 8})
    with pytest.raises(Stop):
        compiled(tmp_path / "o", progress=stop_at("calibrate", 1))
    with pytest.raises(Stop):
        compiled(tmp_path / "o", other, progress=stop_at("rollouts", 1))
    found = compiled(tmp_path / "o")
    assert len(timesteps_in(tmp_path / "o/calibration")) == 4
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_weights_of_one_run_are_never_paired_with_the_schedule_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends between its two files, after one of other settings in the same folder."""
    expected = compiled(tmp_path / "o", budget="90%")

    def killed(path: Path, data: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write_json_atomic", killed)
        with pytest.raises(Stop):
            compiled(tmp_path / "o", budget="70%")
    found = compiled(tmp_path / "o", budget="90%")
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_stage_that_begins_has_no_record_until_it_ends(tmp_path: Path) -> None:
    with Workspace(tmp_path / "o") as space:
        with space.stage("quality", "a"):
            pass
        with pytest.raises(Stop), space.stage("quality", "b"):
            raise Stop
    with Workspace(tmp_path / "o") as space:
        assert not space.finished("quality", "a")


@pytest.mark.parametrize("change", ["sampler", "data", "timestep_high"])
def test_a_compilation_notices_what_it_learns_from(tmp_path: Path, change: str) -> None:
    def batches(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [{"x": torch.randn(4, 2, 6, 6, generator=generator), "t": torch.linspace(0.1, 0.9, 4)}]  # fmt: skip

    one: dict[str, Any] = {"config": settings(routing={"buckets": 1})}
    two = dict(one)
    if change == "sampler":
        two["sampler"] = FlowSteps(torch.tensor([0.9, 0.6, 0.4, 0.1, 0.0]), 1.0)
    if change == "data":
        one["data"], two["data"] = batches(0), batches(1)
    if change == "timestep_high":
        two["config"] = settings(routing={"buckets": 1, "timestep_high": 1000.0})
    before = compiled(tmp_path / "o", **one)
    after = compiled(tmp_path / "o", **two)
    assert not all(torch.equal(before[n], t) for n, t in after.items())
    again = compiled(tmp_path / "o", **two, progress=stop_at("calibrate", 1))
    assert all(torch.equal(after[n], t) for n, t in again.items())


# ------------------------------------------------------------------------------------- identities


def test_samplers_are_told_apart_by_class_timesteps_and_scheduler() -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    class Own(FlowSteps):
        pass

    def flow(shift: float) -> SchedulerSampler:
        return SchedulerSampler(FlowMatchEulerDiscreteScheduler(shift=shift), 3)

    every = [
        Own(torch.tensor([1.0, 0.5, 0.0]), 1.0), FlowSteps(torch.tensor([1.0, 0.5, 0.0]), 1.0), FlowSteps(torch.tensor([1.0, 0.5, 0.1]), 1.0),
        flow(1.0), flow(3.0), SchedulerSampler(DDIMScheduler(), 3),
        SchedulerSampler(DDIMScheduler(clip_sample=False), 3),
    ]  # fmt: skip
    assert len({str(sampler_identity(sampler)) for sampler in every}) == len(every)
    alike = [Own(torch.tensor([1.0, 0.5, 0.0]), 1.0) for _ in range(6)]
    for sampler, value in zip(
        alike, (1.0, 2.0, "a", torch.ones(2), [torch.zeros(2)]), strict=False
    ):
        sampler.damping = value
    assert len({str(sampler_identity(sampler)) for sampler in alike}) == len(alike)
    assert sampler_identity(flow(3.0)) == sampler_identity(flow(3.0))
    # the set that diffusers lists there is in another order in every process
    assert "_use_default_values" not in str(sampler_identity(flow(3.0)))


def test_conditions_of_the_example_count_and_its_noise_does_not() -> None:
    class Styled(OwnDiT):
        def forward(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
            return super().forward(x + style[:, :, None, None], t)

    def identity(x: float, style: float) -> Any:
        torch.manual_seed(0)
        inputs = {**inputs_for(), "style": torch.full((2, 2), style)}
        inputs["x"] = inputs["x"] + x
        program = dcr.route(Styled().eval(), inputs, settings().routing).program
        return states_identity(program, None, settings(), FlowSteps(torch.ones(2), 1.0), None)

    assert identity(0.0, 1.0) == identity(1.0, 1.0) != identity(0.0, 2.0)


def test_what_changes_no_result_is_in_no_key() -> None:
    plain = calibration_settings(settings())
    assert calibration_settings(settings(rollouts={"max_gib": 1.0})) == plain
    one, two = (
        calibration_settings(settings(budget={"metric": "latency", "table": table}))
        for table in ("here.json", "there.json")
    )
    assert one == two != plain
