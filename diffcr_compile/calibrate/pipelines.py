"""A pipeline as input: which component denoises, what it is called with, and its calls as training data.

Nothing here knows a model. The pipeline is run as its user runs it, with hooks around its components;
the one that is called at every step is the denoiser, and what it is called with are its inputs: sample,
timestep and conditions as the pipeline's own scheduler and guidance make them.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile.blocks import get_leaf, leaves
from diffcr_compile.calibrate.data import (
    TeacherStates,
    batched_inputs,
    join_shards,
)
from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.pipeline_calls import (
    DenoiserCall,
    Inputs,
    one_per_sample,
    plain_output,
    run_pipeline,
    timestep_name,
    watching,
)
from diffcr_compile.calibrate.rollout_size import StatesSize
from diffcr_compile.calibrate.samplers import scheduler_identity
from diffcr_compile.calibrate.shards import made_in_shards
from diffcr_compile.capture import TIMESTEP_NAMES
from diffcr_compile.config import RolloutConfig, RoutingConfig
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.program import Program
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.schedule import TimestepBuckets
from diffcr_compile.signature import same_constant

FEW_STEPS = 3  # enough to see what changes between steps
# An expanded timestep must give the same output; other kernels may round otherwise.
SAME_OUTPUT = 1e-4


@dataclasses.dataclass(frozen=True)
class PipelineRuns:
    """A pipeline that can be run again and again, with its denoiser found.

    Attributes:
        pipe: the pipeline.
        inputs: keyword arguments of the pipeline's call, one dict per kind of run; they take turns.
        component: name of the denoiser among the pipeline's components.
        model: the denoiser.
        example: inputs of its first call, by parameter name.
        timestep: which of them is the timestep; None if it could not be told.
        timesteps: the values that the timestep takes, in sampling order.
        steps: sampling steps of a run whose inputs name none.
        bytes_per_run: what the records of one run take.
        images: how many images a run makes; None if its output does not say.
    """

    pipe: Any
    inputs: tuple[Inputs, ...]
    component: str
    model: nn.Module
    example: dict[str, Any]
    timestep: str | None
    timesteps: tuple[float, ...]
    steps: int
    bytes_per_run: int
    images: int | None = None

    @property
    def identity(self) -> Any:
        """What the records depend on, beside the weights: scheduler, call arguments, timesteps."""
        scheduler = scheduler_identity(getattr(self.pipe, "scheduler", None))
        given = [{k: _digest(v) for k, v in run.items()} for run in self.inputs]
        return [scheduler, given, self.component, self.timesteps]

    def buckets(self, config: RoutingConfig) -> TimestepBuckets | None:
        """Timestep buckets with equally many sampling steps; None where the settings name a range."""
        if (config.timestep_low, config.timestep_high) != (None, None):
            return None
        return equal_steps(self.timesteps, config.buckets)

    def teacher_states(
        self,
        program: Program,
        config: RolloutConfig,
        routing: RoutingConfig,
        seed: int,
        folder: Path | None = None,
        progress: PhaseProgress | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        key: str | None = None,
    ) -> TeacherStates:
        """Run the pipeline and keep every call of the denoiser, with the dense model's answer.

        Args:
            program: CAPTURED or ROUTED; says how the calls become graph inputs.
            config: how many runs, and how much memory they may take.
            routing: number of timestep buckets.
            seed: of the noise.
            folder: where finished runs are kept, so that an interrupted call goes on; None for none.
            progress: called with ("rollouts", done, all).
            ranks: who shares the work, through the folder.
            key: what the runs depend on, see :func:`made_in_shards`.

        Raises:
            ResourceError: the records would take more than ``rollouts.max_gib``.
            UsageError: calls differ in more than tensor values.
        """
        self.size(config).check(config.max_gib, "rollouts.pipeline_runs", folder)
        shards = made_in_shards(
            config.pipeline_runs,
            lambda run: self._shard(program, run, seed),
            folder,
            progress,
            ranks,
            key,
        )
        return join_shards(program, shards, self.buckets(routing))

    def size(self, config: RolloutConfig) -> StatesSize:
        """What the records of all runs take."""
        return StatesSize(config.pipeline_runs, self.bytes_per_run)

    def _shard(self, program: Program, run: int, seed: int) -> dict[str, Tensor]:
        """The calls of one run, joined along the batch."""
        calls: list[DenoiserCall] = []
        with watching(
            {self.component: self.model}, self.timestep, lambda _, c: calls.append(c)
        ):
            run_pipeline(
                self.pipe,
                self.inputs[run % len(self.inputs)],
                self.steps,
                seed * 100_003 + run,
            )
        batched, timestep = batched_inputs(program), program.timestep_input
        if timestep not in batched:
            raise UsageError(
                f"the timestep input {timestep!r} has no batch axis and the model gives another answer "
                "with one; states of several timesteps cannot be trained on together"
            )
        collected: dict[str, list[Tensor]] = {name: [] for name in program.example}
        for call in calls:
            tensors = _graph_inputs(program, call.inputs)
            for name, tensor in tensors.items():
                collected[name].append(tensor)
                if name not in batched and not torch.equal(tensor, collected[name][0]):
                    raise UsageError(
                        f"the input {name} {tuple(tensor.shape)} has no batch axis and changes between "
                        "calls; states with different ones cannot be trained on together"
                    )
        inputs = {n: torch.cat(t) if n in batched else t[0] for n, t in collected.items()}
        assert timestep is not None
        if inputs[timestep][0].numel() != 1:
            raise UsageError(
                f"{timestep} has {inputs[timestep][0].numel()} values per sample; a timestep bucket "
                "needs one value per sample"
            )
        return {
            **{f"input.{n}": t.contiguous() for n, t in inputs.items()},
            "target": torch.cat([call.output for call in calls]),
            "timesteps": inputs[timestep].float().flatten().clone(),  # files hold no views
        }


def is_pipeline(value: object) -> bool:
    """Whether it looks like a pipeline of diffusers: callable, with named components, no module."""
    if isinstance(value, nn.Module) or not callable(value):
        return False
    return isinstance(getattr(value, "components", None), Mapping)


def open_pipeline(
    pipe: Any,
    inputs: Inputs | Sequence[Inputs] | None = None,
    component: str | None = None,
    steps: int = FEW_STEPS,
) -> PipelineRuns:
    """Run a pipeline once, find its denoiser and what it is called with.

    Args:
        pipe: the pipeline.
        inputs: keyword arguments of its call, or several such dicts (several prompts); None for a
            short prompt and the pipeline's own defaults.
        component: name of the denoiser, where there are several.
        steps: sampling steps, where `inputs` name none.

    Raises:
        UsageError: the pipeline does not run on `inputs`, or `component` must be named.
        UnsupportedModelError: what a graph takes as constants changes between calls.
    """
    runs = _as_runs(pipe, inputs)
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    if component is not None and component not in modules:
        raise UsageError(
            f"the pipeline has no component {component!r} that is a model; it has {sorted(modules)}"
        )
    first: dict[str, DenoiserCall] = {}
    count = dict.fromkeys(modules, 0)
    times: dict[str, list[float]] = {name: [] for name in modules}

    def note(name: str, call: DenoiserCall) -> None:
        _check_alike(name, first.setdefault(name, call), call, component)
        count[name] += 1
        timestep = timestep_name(call.inputs)
        if timestep is not None:
            times[name].append(float(call.inputs[timestep].flatten()[0]))

    with watching(modules, None, note):
        output = run_pipeline(pipe, runs[0], steps, seed=0)
    wanted = int(runs[0].get("num_inference_steps", steps))
    chosen = component or _denoiser(modules, first, count, wanted)
    if chosen not in first:
        raise UsageError(f"the pipeline never calls its component {chosen!r} on these inputs")
    model, example = modules[chosen], first[chosen].inputs
    timestep = timestep_name(example)
    if timestep is not None:
        example = _with_batched_timestep(model, first[chosen], timestep)
    return PipelineRuns(
        pipe,
        runs,
        chosen,
        model,
        example,
        timestep,
        tuple(dict.fromkeys(times[chosen])),
        steps,
        count[chosen] * _bytes(first[chosen]),
        _images(output),
    )


def _images(output: Any) -> int | None:
    """Images, or videos, or sounds, of a pipeline's output."""
    try:
        return len(output[0])
    except (TypeError, IndexError, KeyError):
        return None


def equal_steps(timesteps: Sequence[float], count: int) -> TimestepBuckets:
    """`count` buckets with equally many of these timesteps, weighted by their share.

    Raises:
        UsageError: fewer timesteps than buckets, or none is known.
    """
    values = sorted(set(timesteps))
    if not values:
        raise UsageError(
            "the range of the timesteps cannot be told: the denoiser is called without an input named "
            f"one of {', '.join(TIMESTEP_NAMES)}. Set routing.timestep_low and routing.timestep_high."
        )
    if len(values) < count:
        raise UsageError(
            f"the pipeline ran at {len(values)} timesteps, fewer than routing.buckets = {count}. Sample "
            "with more steps (num_inference_steps), or set fewer buckets."
        )
    groups = [list(group) for group in np.array_split(values, count)]
    inner = [(a[-1] + b[0]) / 2 for a, b in itertools.pairwise(groups)]
    low = 0.0 if values[0] > 0 else values[0] - 1.0  # a bucket is (low, high]
    weights = tuple(len(group) / len(values) for group in groups)
    return TimestepBuckets((low, *map(float, inner), float(values[-1])), weights)


def _as_runs(pipe: Any, inputs: Inputs | Sequence[Inputs] | None) -> tuple[Inputs, ...]:
    if inputs is None:
        takes_prompt = "prompt" in inspect.signature(type(pipe).__call__).parameters
        return ({"prompt": "a photograph of a cat"} if takes_prompt else {},)
    runs = (inputs,) if isinstance(inputs, Mapping) else tuple(inputs)
    if not runs or not all(isinstance(run, Mapping) for run in runs):
        raise UsageError(
            "pipeline inputs must be a dict of the pipeline's keyword arguments, or a list of such "
            f"dicts, got {type(inputs).__name__}"
        )
    return runs


def _denoiser(
    modules: Mapping[str, nn.Module],
    first: Mapping[str, DenoiserCall],
    count: Mapping[str, int],
    steps: int,
) -> str:
    """The component that is called at every step; alone of its class."""
    timed = [name for name, call in first.items() if timestep_name(call.inputs)]
    calls_of: dict[type, int] = {}  # by class: two models may share the steps between them
    for name in timed or first:
        calls_of[type(modules[name])] = calls_of.get(type(modules[name]), 0) + count[name]
    kinds = [kind for kind, calls in calls_of.items() if calls >= steps]
    alike = [name for name, module in modules.items() if type(module) in kinds]
    if len(alike) == 1:
        return alike[0]
    called = ", ".join(f"{name} ({calls} calls)" for name, calls in count.items())
    found = f"several components that may be the denoiser ({', '.join(alike)})"
    raise UsageError(
        f"the pipeline has {found if alike else 'no denoiser'}; in {steps} steps it called {called}. "
        "Name one: component= in Python, diffusers:<folder>#<name> on the command line."
    )


def _check_alike(
    name: str, first: DenoiserCall, call: DenoiserCall, component: str | None
) -> None:
    """A graph fixes shapes and everything that is no tensor; they must not change from call to call."""
    if component not in (None, name) or timestep_name(call.inputs) is None:
        return  # a text encoder may be called with what it likes
    one, two = dict(leaves(first.inputs)), dict(leaves(call.inputs))
    for path in {**one, **two}:
        before, now = one.get(path), two.get(path)
        if (
            isinstance(before, Tensor)
            and isinstance(now, Tensor)
            and before.shape == now.shape
        ):
            continue
        if not isinstance(before, Tensor) and same_constant(now, before):
            continue
        shown = [
            str(tuple(v.shape)) if isinstance(v, Tensor) else repr(v) for v in (before, now)
        ]
        raise UnsupportedModelError(
            f"the pipeline calls {name} with {'.'.join(map(str, path))} = {shown[0]} and later {shown[1]}; a graph "
            "takes tensors of one shape, and everything else is fixed in it. For prompts of different "
            "length pad them to one (or max_sequence_length)."
        )


def _with_batched_timestep(
    model: nn.Module, call: DenoiserCall, timestep: str
) -> dict[str, Any]:
    """The inputs with one timestep per sample, if the model gives the same answer then."""
    given = call.inputs[timestep]
    expanded = {**call.inputs, timestep: one_per_sample(call.inputs, timestep)}
    if expanded[timestep].shape == given.shape:
        return call.inputs
    try:
        with torch.no_grad():
            output = pytree.tree_leaves(plain_output(model(**expanded)))[0]
    except Exception:  # noqa: BLE001 - whatever it raises, the model does not take it so
        return call.inputs
    scale = call.output.abs().max().clamp_min(1e-30)
    same = output.shape == call.output.shape and bool(
        (output - call.output).abs().max() <= SAME_OUTPUT * scale
    )
    return expanded if same else call.inputs


def _graph_inputs(program: Program, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = program.signature.tensors((), inputs)
    batched = batched_inputs(program)
    for name, tensor in tensors.items():
        skip = 1 if name in batched else 0
        if tensor.shape[skip:] != program.example[name].shape[skip:]:
            raise UsageError(
                f"a run of the pipeline calls the denoiser with {name} {tuple(tensor.shape)}, the "
                f"example was {tuple(program.example[name].shape)}; give all runs one size and length"
            )
    bound = program.signature.bind((), inputs)
    for path, expected in program.signature.constants:
        value = get_leaf(bound, path)
        if not same_constant(value, expected):
            raise UsageError(
                f"a run of the pipeline calls the denoiser with {'.'.join(map(str, path))} = {value!r}, the "
                f"example had {expected!r}; a graph cannot change it"
            )
    return tensors


def _bytes(call: DenoiserCall) -> int:
    tensors = [t for _, t in leaves(call.inputs) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in [*tensors, call.output])


def _digest(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    flat = value.detach().double().flatten()
    weights = torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)
    return [str(value.dtype), list(value.shape), float((flat * weights).sum())]
