"""Training data from clean latents: noise by a scheduler, answers by the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from torch.utils.data import Dataset

import diffcr_compile as dcr
from diffcr_compile.calibrate.latents import LatentStates, _towards
from diffcr_compile.errors import UsageError
from diffcr_compile.program import run_flat
from diffcr_compile.schedule import TimestepBuckets
from tests.conftest import routed_tiny_dit
from tests.model_parts import OwnDiT, inputs_for

BUCKETS = TimestepBuckets.even(4)
PREDICTIONS = ("epsilon", "v_prediction", "flow")


def scheduler(prediction: str) -> Any:
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)


def samples(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "latent": torch.randn(1, 16, 16, generator=generator),
            "class_labels": torch.tensor(number % 10),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_states_are_the_hand_written_formula(
    cases: Callable[[str], Any], prediction: str
) -> None:
    """x_t from the noise level by hand; the noise from the same generator, drawn again."""
    program = cases("dit").routed
    data = samples()
    states = LatentStates(data, scheduler(prediction), prediction, per_latent=4, batch=5)
    found = states.teacher_states(program, BUCKETS, seed=11)
    assert len(found) == 24
    generator = torch.Generator().manual_seed(11)
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    shifted = (
        torch.arange(1, 1001, dtype=torch.float32) / 1000
    )  # one lies on an edge, so as there
    shifted = 3 * shifted / (1 + 2 * shifted)
    for number in range(24):
        item = data[number // 4]
        bucket = number % 4
        low, high = BUCKETS.ranges()[bucket]
        every = shifted * 1000 if prediction == "flow" else torch.arange(1000).double()
        inside = every[(every > low) & (every <= high) | ((bucket == 0) & (every == low))]
        t = inside[int(torch.randint(len(inside), (), generator=generator))]
        noise = torch.randn(1, 16, 16, generator=generator)
        if prediction == "flow":
            expected = (1 - t / 1000) * item["latent"] + t / 1000 * noise
        else:
            expected = kept[int(t)].sqrt() * item["latent"] + (1 - kept[int(t)]).sqrt() * noise
        # Schedulers keep their tables in fp32.
        assert float(found.timesteps[number]) == pytest.approx(float(t), rel=1e-5)
        torch.testing.assert_close(
            found.inputs["hidden_states"][number], expected.float(), rtol=1e-3, atol=1e-3
        )
        assert found.inputs["class_labels"][number] == item["class_labels"]
    with torch.no_grad():
        (answer,) = run_flat(program, dict(found.inputs))
    torch.testing.assert_close(found.target, answer, rtol=1e-4, atol=1e-5)  # other batches
    assert [len(rows) for rows in found.by_bucket(BUCKETS)] == [6] * 4


class Numbered(Dataset[dict[str, Tensor]]):
    """Map-style: no ``__iter__``, and no IndexError at the end."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return samples()[index % 3]


def test_iterables_and_datasets_give_the_same(cases: Callable[[str], Any]) -> None:
    def stream() -> Iterator[dict[str, Tensor]]:
        yield from samples()[:3]

    made = [
        LatentStates(source, scheduler("flow"), "flow").teacher_states(
            cases("dit").routed, BUCKETS, 0
        )
        for source in (Numbered(), samples()[:3], stream())
    ]
    for other in made[1:]:
        assert torch.equal(made[0].target, other.target)
        assert torch.equal(made[0].inputs["hidden_states"], other.inputs["hidden_states"])


class WithPositions(OwnDiT):
    """Positions of the tokens are one input for all samples."""

    def forward(self, x: Tensor, t: Tensor, pos: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t / 1000)
        tokens = tokens + pos
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.image(tokens)


def test_inputs_without_a_batch_axis_may_be_given_once_and_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(36, 16, generator=generator)
    program = dcr.route(WithPositions().eval(), inputs_for(pos=positions)).program
    latents = [{"latent": torch.randn(2, 6, 6, generator=generator)} for _ in range(4)]

    def states(data: Any) -> Any:
        return LatentStates(data, scheduler("flow"), "flow").teacher_states(
            program, BUCKETS, 0
        )

    given = states([{**latent, "pos": positions} for latent in latents])
    assert torch.equal(given.target, states(latents).target)
    other = [{**latent, "pos": positions + number} for number, latent in enumerate(latents)]
    with pytest.raises(UsageError, match="pos has no batch axis and differs between latents"):
        states(other)


def test_joined_channels_follow_the_noisy_latent(cases: Callable[[str], Any]) -> None:
    """As an inpainting model takes them: here two of four channels are given, and get no noise."""
    program = cases("sd3").routed
    known = torch.full((2, 8, 8), 7.0)
    data = [
        {
            "latent": torch.zeros(2, 8, 8),
            "known": known,
            "encoder_hidden_states": torch.zeros(7, 24),
            "pooled_projections": torch.zeros(48),
        }
    ]
    states = LatentStates(data, scheduler("flow"), "flow", joined=("known",))
    found = states.teacher_states(program, BUCKETS, 0)
    assert torch.equal(found.inputs["hidden_states"][:, 2:], known.expand(4, 2, 8, 8))
    assert found.inputs["hidden_states"][:, :2].std() > 0.1


def test_scaled_and_chosen_timesteps_reach_the_model(cases: Callable[[str], Any]) -> None:
    ddpm = scheduler("epsilon")
    chosen = [100, 300, 600, 900]
    states = LatentStates(samples(), ddpm, "epsilon", timesteps=chosen, timestep_scale=0.5)
    buckets = TimestepBuckets.even(4, 0.0, 500.0)
    found = states.teacher_states(cases("dit").routed, buckets, 0)
    assert sorted(set(found.timesteps.tolist())) == [50, 150, 300, 450]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_target_moves_towards_the_truth(
    cases: Callable[[str], Any], prediction: str, share: float
) -> None:
    """The truth by hand, from the same draws; states and timesteps stay what they are without it."""
    program, data, noisy = cases("dit").routed, samples(2), scheduler(prediction)
    answers, mixed = (
        LatentStates(data, noisy, prediction, per_latent=2, true_share=s).teacher_states(
            program, BUCKETS, seed=5
        )
        for s in (0.0, share)
    )
    assert torch.equal(mixed.timesteps, answers.timesteps)
    generator = torch.Generator().manual_seed(5)
    kept = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    for number, t in enumerate(mixed.timesteps):
        latent = data[number // 2]["latent"]
        torch.randint(250, (), generator=generator)  # the draw of the timestep
        noise = torch.randn(1, 16, 16, generator=generator)
        signal, spread = kept[int(t)].sqrt(), (1 - kept[int(t)]).sqrt()
        truth = {
            "epsilon": noise,
            "v_prediction": signal * noise - spread * latent,
            "flow": noise - latent,
        }[prediction]
        expected = (1 - share) * answers.target[number] + share * truth
        torch.testing.assert_close(mixed.target[number], expected, rtol=1e-4, atol=1e-4)


def test_learned_variances_stay_the_dense_models() -> None:
    answers, truths = torch.randn(3, 4, 2, 2), torch.randn(3, 2, 2, 2)
    found = _towards(answers, truths, 0.5)
    assert torch.equal(found[:, 2:], answers[:, 2:])
    torch.testing.assert_close(found[:, :2], (answers[:, :2] + truths) / 2)
    with pytest.raises(UsageError, match="true_share needs an output"):
        _towards(answers, torch.randn(3, 5, 2, 2), 0.5)


def without(name: str) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in item.items() if k != name} for item in samples()]


def spoiled(value: float) -> list[dict[str, Tensor]]:
    items = samples()
    items[2]["latent"][0, 0, 0] = value
    return items


def of_shape(*shape: int) -> list[dict[str, Tensor]]:
    return [*samples(), {**samples()[0], "latent": torch.zeros(*shape)}]


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "no latents"),
        (without("class_labels"), {}, r"latent 0: lacks the inputs \['class_labels'\]"),
        (without("latent"), {}, "expected a mapping with a tensor 'latent'"),
        ([torch.zeros(1, 16, 16)], {}, "expected a mapping"),
        (of_shape(1, 16, 8), {}, r"latent 6 has shape \(1, 16, 8\), expected \(1, 16, 16\)"),
        ([{**samples()[0], "labels": torch.tensor(1)}], {}, r"unknown \['labels'\]"),
        (spoiled(float("nan")), {}, "NaN or infinity"),
        (samples(), {"timestep_scale": 2.0}, "timesteps out of range.*0 to 1998"),
        (samples(), {"timesteps": [100, 200]}, "no timestep of the scheduler falls into"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_first_step(
    cases: Callable[[str], Any], data: Any, options: dict[str, Any], words: str
) -> None:
    states = LatentStates(data, scheduler("epsilon"), "epsilon", **options)
    with pytest.raises(UsageError, match=words):
        states.teacher_states(cases("dit").routed, BUCKETS, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LatentStates([], scheduler("epsilon"), "v_prediction"), "is set to epsilon"),
        (lambda: LatentStates([], scheduler("epsilon"), "flow"), "has no scale_noise"),
        (lambda: LatentStates([], scheduler("flow"), "noise"), "prediction is epsilon"),  # type: ignore[arg-type]
        (lambda: LatentStates([], EulerDiscreteScheduler(), "epsilon"), "another scale"),
        (
            lambda: LatentStates([], scheduler("epsilon"), "epsilon", timesteps=[1000]),
            "timesteps out of range",
        ),
        (lambda: LatentStates([], scheduler("epsilon"), "epsilon", batch=0), "at least 1"),
        (
            lambda: LatentStates([], scheduler("epsilon"), "epsilon", true_share=1.1),
            "true_share must be in",
        ),
    ],
)
def test_schedulers_that_do_not_fit_are_refused_at_once(
    make: Callable[[], LatentStates], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make()
    assert caught.value.code == "DCR-U062"


def test_a_calibration_runs_on_latents(tmp_path: Any) -> None:
    settings = {
        "routing": {"buckets": 2, "multiple_of": 16},
        "calibration": {"steps": 2, "batch": 2, "train": "router"},
    }
    routed = routed_tiny_dit()
    data = dcr.LatentStates(samples(2), scheduler("flow"), "flow")
    config = dcr.CompileConfig.model_validate(settings)
    result = dcr.calibrate(routed, data, budget="70%", config=config)
    assert result.schedule.reached <= 0.7
    assert len(result.history) == 2


def test_rollouts_of_another_shape_than_the_sample_are_refused() -> None:
    """A model that takes more channels than it returns would be broadcast into nonsense."""
    with pytest.raises(UsageError, match="LatentStates"):
        dcr.FlowEuler(4).step(torch.zeros(2, 1, 4, 4), 0, torch.zeros(2, 3, 4, 4))
