"""Training data from a user's own clean latents: noised by a scheduler of diffusers, answered by the dense model.

Rollouts visit the states that the dense sampler meets; clean latents give those of the data, with real
conditions, and are the way for tasks that rollouts know nothing of, such as inpainting.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor

from diffcr_compile.calibrate.data import (
    TeacherStates,
    batched_inputs,
    items,
    label_states,
)
from diffcr_compile.errors import UsageError
from diffcr_compile.program import Program
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.schedule import TimestepBuckets

Prediction = Literal["epsilon", "v_prediction", "flow"]
LATENT = "latent"
CODE = "DCR-U062"
# Of coefficients that schedulers keep in fp32.
SAME = 1e-3


@dataclasses.dataclass(frozen=True)
class LatentStates:
    """Clean latents and how noise is put on them, for ``dcr.calibrate(data=...)``.

    Attributes:
        latents: samples, from an iterable or a map-style dataset: mappings with the clean ``latent``
            (C, H, W) scaled as the model takes it, and the model's other inputs by name, all without a
            batch axis. Inputs that have no batch axis in the model may be left out.
        scheduler: of diffusers, with ``add_noise`` or, for flow matching, ``scale_noise``.
        prediction: what the model predicts; must be what the scheduler says, where it says it.
        joined: entries of the samples that are joined to the noisy latent on the channel axis, in this
            order, such as the mask and the masked image of an inpainting model.
        per_latent: noise levels per latent; timestep buckets take turns over all of them.
        batch: states that the dense model answers at once.
        timesteps: the scheduler's timesteps to draw from; None for all of them.
        timestep_scale: the model is called with ``timestep_scale`` times the scheduler's timestep.
        true_share: share in [0, 1] of the true noise or velocity in what is trained towards; the rest is
            the dense model's answer. For a squared error that is mixing the loss that the model was
            trained with and distillation (Hinton et al. 2015) in one forward. With 0 the dense model is the
            best that can be reached; the truth lets a compressed model pass it, and asks for clean latents
            of the kind that it was trained on.
    """

    latents: Iterable[Mapping[str, Tensor]] | Any
    scheduler: Any
    prediction: Prediction
    joined: Sequence[str] = ()
    per_latent: int = 4
    batch: int = 8
    timesteps: Sequence[float] | None = None
    timestep_scale: float = 1.0
    true_share: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "flow"):
            raise _wrong(
                f"prediction is epsilon, v_prediction or flow, got {self.prediction!r}"
            )
        if self.per_latent < 1 or self.batch < 1:
            raise _wrong(
                f"per_latent and batch must be at least 1, got {self.per_latent} and {self.batch}"
            )
        if not 0 <= self.true_share <= 1:
            raise _wrong(f"true_share must be in [0, 1], got {self.true_share}")
        said = getattr(getattr(self.scheduler, "config", None), "prediction_type", None)
        if self.prediction != "flow" and said not in (None, self.prediction):
            raise _wrong(
                f"prediction is {self.prediction}, but {type(self.scheduler).__name__} is set to {said}"
            )
        self._check_noise()

    def teacher_states(
        self,
        program: Program,
        buckets: TimestepBuckets,
        seed: int,
        progress: PhaseProgress | None = None,
    ) -> TeacherStates:
        """Noisy states of every timestep bucket, with the dense model's answers.

        Args:
            program: CAPTURED, or ROUTED with all tokens kept.
            buckets: the timestep buckets, in the unit of the model's timestep input.
            seed: of noise and timesteps.
            progress: called with ("latents", batches done, all or 0 if that is not known).

        Raises:
            UsageError: no latents, a wrong shape, an unknown or missing input, a timestep bucket that
                no timestep of the scheduler falls into, or timesteps out of range.
        """
        if program.sample_input is None or program.timestep_input is None:
            raise _wrong(
                f"the model's inputs {sorted(program.example)} do not tell which is the noisy sample "
                "and which the timestep; name them, or pass ready batches as data"
            )
        if program.timestep_input not in batched_inputs(program):
            raise _wrong(
                f"the timestep input {program.timestep_input!r} has no batch axis; give example inputs "
                "with one timestep per sample"
            )
        truths: list[Tensor] = []
        drawn = self._drawn(program, buckets, torch.Generator().manual_seed(seed), truths)
        states = label_states(program, self._batches(program, drawn, progress))
        if self.true_share == 0:
            return states
        mixed = _towards(states.target, torch.stack(truths), self.true_share)
        return dataclasses.replace(states, target=mixed)

    def _drawn(
        self,
        program: Program,
        buckets: TimestepBuckets,
        generator: torch.Generator,
        truths: list[Tensor],
    ) -> Iterator[dict[str, Tensor]]:
        """One state after the other: the model's inputs without a batch axis. Fills `truths`."""
        choices = self._choices(buckets)
        number = 0
        for position, item in enumerate(items(self.latents)):
            self._check_item(program, item, position)
            latent = item[LATENT].float()
            for _ in range(self.per_latent):
                choice = choices[number % len(choices)]
                at = int(torch.randint(len(choice), (), generator=generator))
                noise = torch.randn(latent.shape, generator=generator).to(latent.device)
                noisy = self._noisy(latent[None], noise[None], choice[at : at + 1])[0]
                if self.true_share:
                    truths.append(self._truth(latent, noise, choice[at : at + 1]))
                yield self._inputs(program, item, noisy, choice[at])
                number += 1
        if number == 0:
            raise _wrong("there are no latents; give at least one per timestep bucket")

    def _inputs(
        self, program: Program, item: Mapping[str, Tensor], noisy: Tensor, timestep: Tensor
    ) -> dict[str, Tensor]:
        sample, time = program.sample_input, program.timestep_input
        assert sample is not None
        assert time is not None
        channels = [noisy, *(item[name].to(noisy) for name in self.joined)]
        example = program.example[time]
        given = {n: v for n, v in item.items() if n != LATENT and n not in self.joined}
        return {
            **given,
            sample: torch.cat(channels).to(program.example[sample].dtype),
            time: (timestep * self.timestep_scale).to(example.dtype).expand(example.shape[1:]),
        }

    def _batches(
        self,
        program: Program,
        states: Iterator[dict[str, Tensor]],
        progress: PhaseProgress | None,
    ) -> Iterator[dict[str, Tensor]]:
        batched = batched_inputs(program)
        fixed = {n: t for n, t in program.example.items() if n not in batched}
        size = getattr(self.latents, "__len__", lambda: 0)() * self.per_latent
        for number in itertools.count(1):
            part = list(itertools.islice(states, self.batch))
            if not part:
                return
            drawn = {n: torch.stack([s[n] for s in part]) for n in part[0] if n in batched}
            yield {**fixed, **_one_for_all(part, part[0].keys() - batched), **drawn}
            if progress:
                progress("latents", number, -(-size // self.batch))

    def _noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "flow":
            scaled: Tensor = self.scheduler.scale_noise(latents, timesteps, noise)
            return scaled
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def _truth(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What a model without error would expect to predict."""
        if self.prediction == "flow":
            return noise - latent
        if self.prediction == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latent[None], noise[None], timestep)
        return velocity[0]

    def _check_noise(self) -> None:
        """The scheduler must mix latent and noise as the prediction type says, see ``SAME``."""
        wanted = "scale_noise" if self.prediction == "flow" else "add_noise"
        kind = type(self.scheduler).__name__
        if not hasattr(self.scheduler, wanted):
            raise _wrong(f"{kind} has no {wanted}, which {self.prediction} needs")
        every = self._timesteps()
        one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        middle = every[len(every) // 2][None]
        of_latent = float(self._noisy(one, none, middle))
        of_noise = float(self._noisy(none, one, middle))
        total = (
            of_latent + of_noise if self.prediction == "flow" else of_latent**2 + of_noise**2
        )
        if abs(total - 1) > SAME:
            raise _wrong(
                f"{kind} mixes {of_latent:.3g} of the latent with {of_noise:.3g} of the noise at timestep "
                f"{float(middle):g}: it works on another scale than the model's input. Pass "
                "DDPMScheduler.from_config(scheduler.config), or a flow-matching scheduler"
            )

    def _timesteps(self) -> Tensor:
        """The scheduler's timesteps to draw from, ascending."""
        if self.prediction == "flow":
            known: Tensor = self.scheduler.timesteps.float().cpu().sort().values
        else:
            known = torch.arange(int(self.scheduler.config.num_train_timesteps))
        if self.timesteps is None:
            return known
        asked = torch.tensor([float(t) for t in self.timesteps], dtype=torch.float64)
        unknown = [float(t) for t in asked if not bool((known.double() == t).any())]
        if len(asked) == 0 or unknown:
            raise _wrong(
                f"timesteps out of range: {unknown[:5] or 'none given'}; "
                f"{type(self.scheduler).__name__} has {len(known)} from {float(known[0]):g} to "
                f"{float(known[-1]):g}"
            )
        return asked.to(known.dtype).sort().values

    def _choices(self, buckets: TimestepBuckets) -> list[Tensor]:
        """The scheduler's timesteps that fall into each bucket."""
        every = self._timesteps()
        seen = every.double() * self.timestep_scale
        low, high = buckets.edges[0], buckets.edges[-1]
        if float(seen[0]) < low or float(seen[-1]) > high:
            raise _wrong(
                f"timesteps out of range: the model would be called with {float(seen[0]):g} to "
                f"{float(seen[-1]):g}, the timestep buckets go from {low:g} to {high:g}. Set "
                "timestep_scale, or routing.timestep_low and timestep_high"
            )
        of = torch.tensor([buckets.index_of(float(t)) for t in seen])
        choices = [every[of == index] for index in range(len(buckets))]
        empty = [
            span
            for span, found in zip(buckets.ranges(), choices, strict=True)
            if len(found) == 0
        ]
        if empty:
            raise _wrong(f"no timestep of the scheduler falls into {empty}")
        return choices

    def _check_item(self, program: Program, item: Any, position: int) -> None:
        where = f"latent {position}"
        if not isinstance(item, Mapping) or not isinstance(item.get(LATENT), Tensor):
            raise _wrong(
                f"{where}: expected a mapping with a tensor {LATENT!r}, got {type(item).__name__}"
            )
        batched = batched_inputs(program)
        own = {program.sample_input, program.timestep_input}
        wanted = {*(batched - own), *self.joined, LATENT}
        allowed = {*wanted, *(set(program.example) - own)}
        missing, unknown = sorted(wanted - set(item)), sorted(set(item) - allowed)
        if missing or unknown:
            raise _wrong(f"{where}: lacks the inputs {missing} and has the unknown {unknown}")
        assert program.sample_input is not None
        whole = tuple(program.example[program.sample_input].shape[1:])
        latent = item[LATENT]
        more = sum(item[name].shape[0] for name in self.joined)
        expected = (whole[0] - more, *whole[1:])
        if tuple(latent.shape) != expected:
            raise _wrong(f"{where} has shape {tuple(latent.shape)}, expected {expected}")
        for name in wanted - {LATENT, *self.joined}:
            shape = tuple(program.example[name].shape[1:])
            if tuple(item[name].shape) != shape:
                raise _wrong(
                    f"{where}: {name} has shape {tuple(item[name].shape)}, expected {shape}"
                )


def _one_for_all(states: list[dict[str, Tensor]], names: Set[str]) -> dict[str, Tensor]:
    """Inputs without a batch axis, which all states must give alike."""
    for name in names:
        if not all(torch.equal(state[name], states[0][name]) for state in states):
            raise _wrong(
                f"{name} has no batch axis and differs between latents; states with different ones cannot be trained on "
                "together. Give it a batch axis in the example inputs"
            )
    return {name: states[0][name] for name in names}


def _towards(answers: Tensor, truths: Tensor, share: float) -> Tensor:
    """The dense model's answers (M, C, ...), moved by `share` towards the truth (M, c, ...).

    Channels beyond c, such as a learned variance, stay what the dense model says.
    """
    channels = truths.shape[1]
    rest = answers[:, channels:]
    if answers[:, :channels].shape != truths.shape:
        raise _wrong(
            f"true_share needs an output with the latent's channels first: the latents have shape "
            f"{tuple(truths.shape[1:])}, the output {tuple(answers.shape[1:])}. Set true_share to 0"
        )
    mixed = answers[:, :channels].lerp(truths.to(answers), share)
    return torch.cat([mixed, rest], 1)


def _wrong(problem: str) -> UsageError:
    return UsageError(f"{problem}.", code=CODE)
