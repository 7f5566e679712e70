"""Training data: inputs of the model and what the dense model answers.

The default source are teacher rollouts: run the dense sampler, keep every state. No training set is
needed, and the states are the ones that inference will meet. Rollouts are cached in shards, so an
interrupted run goes on where it was, and several ranks share the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.mean_steps import check_memoryless, output_leading_to, refined
from diffcr_compile.calibrate.samplers import Sampler, model_input, timestep_like
from diffcr_compile.calibrate.shards import Shard, made_in_shards
from diffcr_compile.config import RolloutConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.program import Program, run_flat
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.schedule import TimestepBuckets

Conditions = Callable[[torch.Generator, int], Mapping[str, Tensor]]
TIMESTEP_SLACK = 1e-6  # of the range: timesteps are fp32


@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """Inputs with the dense model's first output.

    Attributes:
        inputs: placeholder name -> (M, ...); inputs without a batch axis stand as they are.
        target: (M, ...) output of the dense model.
        timesteps: (M,) value of the timestep input of each state.
        buckets: timestep buckets that fit these states; None for those of the settings.
        device: where batches are needed; None where they are.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    timesteps: Tensor
    buckets: TimestepBuckets | None = None
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def take(
        self, chosen: Tensor, batched: frozenset[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and targets of the chosen states."""
        rows = {
            name: (tensor[chosen] if name in batched else tensor).to(self.device)
            for name, tensor in self.inputs.items()
        }
        return rows, self.target[chosen].to(self.device)

    def where(self, program: Program) -> TeacherStates:
        """The same, with batches on the device of a program."""
        return dataclasses.replace(self, device=program.device)

    def by_bucket(self, buckets: TimestepBuckets) -> list[Tensor]:
        """Indices of the states of each bucket.

        Raises:
            UsageError: a bucket has no state, or a timestep lies outside of all of them.
        """
        self._check_timesteps(buckets)
        of = torch.tensor([buckets.index_of(float(t)) for t in self.timesteps])
        found = [torch.nonzero(of == index).flatten() for index in range(len(buckets))]
        empty = [buckets.ranges()[i] for i, states in enumerate(found) if len(states) == 0]
        if empty:
            raise UsageError(
                f"no training state has a timestep in {empty}; the data's timesteps run from "
                f"{self.timesteps.min():g} to {self.timesteps.max():g}. Give data that covers "
                "every timestep bucket, or set routing.timestep_low and timestep_high."
            )
        return found

    def _check_timesteps(self, buckets: TimestepBuckets) -> None:
        low, high = buckets.edges[0], buckets.edges[-1]
        slack = TIMESTEP_SLACK * (high - low)
        outside = (self.timesteps < low - slack) | (self.timesteps > high + slack)
        if outside.any():
            raise UsageError(
                f"{int(outside.sum())} of {len(self)} training states have a timestep outside of "
                f"[{low:g}, {high:g}]; they run from {self.timesteps.min():g} to "
                f"{self.timesteps.max():g}. Set routing.timestep_low and routing.timestep_high to the "
                "range that the model is called with, or mend the data.",
                code="DCR-U073",
            )


def batched_inputs(program: Program) -> frozenset[str]:
    """Names of the inputs that have the batch on axis 0."""
    batch = program.batch
    return frozenset(
        name for name, t in program.example.items() if t.ndim > 0 and t.shape[0] == batch
    )


def example_conditions(program: Program) -> Conditions:
    """Everything but sample and timestep as in the example, rows drawn at random."""
    batched = batched_inputs(program)

    def draw(generator: torch.Generator, count: int) -> dict[str, Tensor]:
        rows = torch.randint(program.batch, (count,), generator=generator)
        return {
            name: tensor[rows] if name in batched else tensor
            for name, tensor in program.example.items()
            if name not in (program.sample_input, program.timestep_input)
        }

    return draw


@torch.no_grad()
def roll_out(
    program: Program,
    sampler: Sampler,
    config: RolloutConfig,
    conditions: Conditions,
    seed: int,
    folder: Path | None = None,
    progress: PhaseProgress | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    key: str | None = None,
) -> TeacherStates:
    """Sample with the dense model and keep every state.

    Args:
        program: CAPTURED, or ROUTED with all tokens kept (the same thing).
        sampler: where the timesteps and the steps between them come from.
        config: how many trajectories, in which batches. With ``substeps`` above 1 the dense model takes so many
            steps for each of the sampler's, and the targets are what :mod:`mean_steps` makes of them.
        conditions: draws the other inputs of a batch.
        seed: of noise and conditions.
        folder: where finished shards are kept; None keeps them in memory only.
        progress: called with ("rollouts", done, all).
        ranks: who shares the work, through the folder.
        key: what the states depend on, see :func:`made_in_shards`.
    """
    if program.sample_input is None or program.timestep_input is None:
        raise _wrong(
            "teacher rollouts need to know which input is the noisy sample and which the timestep; "
            f"the inputs are {sorted(program.example)}. Pass data= with your own inputs instead"
        )
    _check_timestep(program, program.timestep_input)
    fine = refined(sampler, config.substeps)
    if config.substeps > 1:
        check_memoryless(sampler, program.example[program.sample_input])

    def shard(number: int) -> Shard:
        size = min(config.batch, config.trajectories - number * config.batch)
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        return _one_shard(program, sampler, fine, conditions, generator, size)

    count = -(-config.trajectories // config.batch)
    return join_shards(program, made_in_shards(count, shard, folder, progress, ranks, key))


def _one_shard(
    program: Program,
    sampler: Sampler,
    fine: Sampler,
    conditions: Conditions,
    generator: torch.Generator,
    size: int,
) -> Shard:
    """States of the sampler's steps, between which the dense model takes those of `fine`."""
    sample, timestep = program.sample_input, program.timestep_input
    assert sample is not None
    assert timestep is not None
    like = program.example[sample]
    state = fine.start(
        torch.randn((size, *like.shape[1:]), generator=generator).to(like.device, like.dtype)
    )
    drawn = _drawn(program, conditions(generator, size), size)
    others = {name: tensor.to(like.device) for name, tensor in drawn.items()}
    substeps = len(fine.timesteps) // len(sampler.timesteps)
    inputs, targets, times = [], [], []
    for index, value in enumerate(sampler.timesteps):
        before, first = state, index * substeps
        for at in range(first, first + substeps):
            now = timestep_like(program.example[timestep], fine.timesteps[at], size)
            seen = model_input(fine, at, state)
            answer = run_flat(program, {**others, sample: seen, timestep: now})[0]
            if at == first:
                inputs.append(seen.cpu())
                target = answer
            state = fine.step(answer, at, state)
        if substeps > 1:
            target = _leading(sampler, index, before, state, target)
        targets.append(target.cpu())
        times.append(torch.full((size,), value))
    steps = len(times)
    batched = batched_inputs(program)
    repeated = {
        name: (t.repeat(steps, *(1,) * (t.ndim - 1)) if name in batched else t).cpu()
        for name, t in others.items()
    }
    return {
        **{f"input.{name}": t.contiguous() for name, t in repeated.items()},
        f"input.{sample}": torch.cat(inputs),
        "target": torch.cat(targets),
        "timesteps": torch.cat(times),
    }


def _drawn(program: Program, found: Any, size: int) -> Mapping[str, Tensor]:
    """What `conditions` returned, if it is what the model takes beside sample and timestep."""
    wanted = set(program.example) - {program.sample_input, program.timestep_input}
    if not isinstance(found, Mapping):
        raise _wrong(
            f"conditions returned a {type(found).__name__}, expected a mapping of tensors by input name: {sorted(wanted)}"
        )
    missing, unknown = sorted(wanted - set(found)), sorted(map(str, set(found) - wanted))
    if missing or unknown:
        raise _wrong(f"conditions lacks the inputs {missing} and has the unknown {unknown}")
    batched = batched_inputs(program)
    for name, tensor in found.items():
        _check_input(f"conditions: {name}", tensor, program.example[name], name in batched)
        if name in batched and len(tensor) != size:
            raise _wrong(
                f"conditions: {name} has {len(tensor)} rows, expected {size}, the second argument"
            )
    return found


def _leading(
    sampler: Sampler, index: int, state: Tensor, later: Tensor, output: Tensor
) -> Tensor:
    """The output that leads to `later`; what else the dense model said, such as a learned variance, stays."""
    made = output_leading_to(sampler, index, state, later)
    return torch.cat([made, output[:, made.shape[1] :]], 1)


def join_shards(
    program: Program,
    shards: list[Shard],
    buckets: TimestepBuckets | None = None,
) -> TeacherStates:
    """Shards with ``input.<name>``, ``target`` and ``timesteps`` as one.

    Raises:
        UsageError: an input without a batch axis differs between them.
    """
    batched = batched_inputs(program)
    names = [key.removeprefix("input.") for key in shards[0] if key.startswith("input.")]
    inputs = {
        name: torch.cat([s[f"input.{name}"] for s in shards])
        if name in batched
        else shards[0][f"input.{name}"]
        for name in names
    }
    for name in set(names) - batched:
        if not all(torch.equal(s[f"input.{name}"], inputs[name]) for s in shards):
            raise UsageError(
                f"the input {name} has no batch axis and differs between rollouts; states with "
                "different ones cannot be trained on together"
            )
    timesteps = torch.cat([s["timesteps"] for s in shards])
    timestep = program.timestep_input
    assert timestep is not None
    if timestep not in inputs:
        example = program.example[timestep]
        inputs[timestep] = timesteps.to(example.dtype).reshape(-1, *(1,) * (example.ndim - 1))
    return TeacherStates(inputs, torch.cat([s["target"] for s in shards]), timesteps, buckets)


@torch.no_grad()
def label_states(program: Program, batches: Iterable[Mapping[str, Tensor]]) -> TeacherStates:
    """The user's own inputs, answered by the dense model.

    Args:
        program: CAPTURED, or ROUTED with all tokens kept.
        batches: dicts of tensors by input name, each with the batch on axis 0.

    Raises:
        UsageError: no data; a batch is no mapping of tensors; an input is missing or has another type or shape than in
            the example; batch sizes differ within a batch; or an input without a batch axis differs between batches.
    """
    if program.timestep_input is None:
        raise _wrong(
            f"none of the inputs {sorted(program.example)} is known to be the timestep; name it timestep"
        )
    _check_timestep(program, program.timestep_input)
    batched = batched_inputs(program)
    collected: dict[str, list[Tensor]] = {name: [] for name in program.example}
    targets = []
    for number, batch in enumerate(items(_several(batches))):
        tensors = _checked_batch(program, batch, number)
        targets.append(_answer(program, tensors))
        for name, tensor in tensors.items():
            collected[name].append(tensor.cpu())
            if name not in batched and not torch.equal(
                collected[name][-1], collected[name][0]
            ):
                raise _wrong(
                    f"calibration batch {number}: {name} has no batch axis and differs from that of batch 0; states with "
                    "different ones cannot be trained on together. Give it a batch axis in the example inputs"
                )
    if not targets:
        raise _wrong(
            "the calibration data is empty; give at least one batch per timestep bucket"
        )
    inputs = {n: torch.cat(t) if n in batched else t[0] for n, t in collected.items()}
    timesteps = inputs[program.timestep_input].float().flatten()
    return TeacherStates(inputs, torch.cat(targets), timesteps)


def _answer(program: Program, tensors: Mapping[str, Tensor]) -> Tensor:
    """The dense model's first output, where the data lie: they may be on another device than the model."""
    moved = {name: t.to(program.example[name].device) for name, t in tensors.items()}
    sample = max(tensors.values(), key=lambda t: t.ndim)
    return run_flat(program, moved)[0].to(sample.device)


def _check_timestep(program: Program, name: str) -> None:
    """States of several timesteps are trained on together, so each needs one of its own."""
    if name not in batched_inputs(program):
        raise _wrong(
            f"the timestep input {name!r} {tuple(program.example[name].shape)} has no batch axis, and states of several "
            "timesteps are trained on together. Give example inputs with one timestep per sample; where the model takes "
            "one for all, wrap it so that it takes one for each"
        )


def _several(batches: Any) -> Iterable[Any]:
    """The batches, if they are several of something."""
    one = isinstance(batches, (Mapping, Tensor, str))
    if one or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise _wrong(
            f"the calibration data is a {type(batches).__name__}, expected several batches, such as a list of dicts of "
            "tensors by input name"
        )
    several: Iterable[Any] = batches
    return several


def items(data: Any) -> Iterator[Any]:
    """The items of an iterable, or of a dataset that is read by number."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[number] for number in range(len(data)))
    return iter(data)


def _checked_batch(program: Program, batch: Any, number: int) -> dict[str, Tensor]:
    """The tensors that the graph takes, each like that of the example but for the batch size."""
    where = f"calibration batch {number}"
    if not isinstance(batch, Mapping):
        raise _wrong(
            f"{where} is a {type(batch).__name__}, expected a mapping of tensors by input name: {sorted(program.example)}"
        )
    missing = sorted(set(program.example) - set(batch))
    if missing:
        raise _wrong(f"{where} lacks the inputs {missing}")
    batched = batched_inputs(program)
    tensors = {name: batch[name] for name in program.example}
    for name, tensor in tensors.items():
        _check_input(f"{where}: {name}", tensor, program.example[name], name in batched)
    sizes = {name: len(tensors[name]) for name in tensors if name in batched}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise _wrong(
            f"{where} needs one batch size of at least 1 for all inputs, found {sizes}"
        )
    return tensors


def _check_input(what: str, tensor: Any, like: Tensor, is_batched: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise _wrong(
            f"{what} is a {type(tensor).__name__}, expected a tensor (torch.as_tensor)"
        )
    if tensor.dtype != like.dtype:
        raise _wrong(
            f"{what} is {tensor.dtype}, expected {like.dtype} as in the example inputs; convert it with .to({like.dtype})"
        )
    want, skip = tuple(like.shape), 1 if is_batched else 0
    if tensor.ndim != len(want) or tuple(tensor.shape[skip:]) != want[skip:]:
        expected = ("batch", *want[1:]) if skip else want
        raise _wrong(f"{what} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise _wrong(f"{what} holds NaN or infinity")


def _wrong(what: str) -> UsageError:
    return UsageError(f"{what}.", code="DCR-U072")
