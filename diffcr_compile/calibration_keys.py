"""What training states and a calibration depend on, as fingerprints: a state with another one is not taken up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcr_compile.budgets import budget_identity
from diffcr_compile.calibrate.data import Conditions, TeacherStates, example_conditions
from diffcr_compile.calibrate.pipelines import PipelineRuns
from diffcr_compile.calibrate.samplers import Sampler, sampler_identity
from diffcr_compile.config import CompileConfig
from diffcr_compile.opened import shapes, weights_hash
from diffcr_compile.program import Program, is_routing_weight
from diffcr_compile.tensor_bytes import tensor_bytes
from diffcr_compile.workspace import fingerprint

# settings that change no result
NO_EFFECT = {
    "calibration": {"checkpointing", "rank_timeout", "save_every", "shard"},
    "rollouts": {"max_gib"},
    "budget": {"table"},  # what the table says counts, not its place: see budget_identity
}


def calibration_settings(config: CompileConfig) -> dict[str, Any]:
    """The settings that a calibration's result depends on."""
    return config.model_dump(exclude={"export": True, "run": True, **NO_EFFECT})


def states_identity(
    program: Program,
    data: Any,
    config: CompileConfig,
    sampler: Sampler,
    conditions: Conditions | None,
) -> Any:
    """What training states depend on, beside the weights.

    Of rollouts it holds settings, range of timesteps, seed, sampler and what conditions are drawn; of teacher states and of
    data in a list or a tuple their content; of anything else (a generator, a data set, latents) only its class, because it
    cannot be read twice.
    """
    if data is not None and not isinstance(data, PipelineRuns):
        return _data_identity(data)
    routing, seed = config.routing, config.calibration.seed
    settings = config.rollouts.model_dump(exclude=NO_EFFECT["rollouts"])
    made = [settings, seed, *routing.timestep_range]
    if data is not None:
        return [*made, data.identity]
    draw = conditions or example_conditions(program)
    drawn = draw(torch.Generator().manual_seed(seed), config.rollouts.batch)
    return [*made, sampler_identity(sampler), _digest(drawn)]


def keys_in_a_folder(
    program: Program, states: Any, config: CompileConfig, share: float, key: str
) -> tuple[str, str]:
    """Of rollouts and of a calibration that are kept in a folder of the user's own.

    Args:
        program: ROUTED, as it is before the calibration.
        states: from :func:`states_identity`.
        config: settings.
        share: the budget.
        key: the user's own part of the key.
    """
    made_of = [shapes(dict(program.example)), [spec.name for spec in program.blocks]]
    weights = weights_hash(program.module, lambda name: not is_routing_weight(program, name))
    routers = weights_hash(program.module, lambda name: is_routing_weight(program, name))
    rollouts = fingerprint(key, weights, made_of, states)
    settings = [share, calibration_settings(config), budget_identity(config.budget)]
    return rollouts, fingerprint(rollouts, routers, program.gate, settings)


def _data_identity(data: Any) -> Any:
    if isinstance(data, TeacherStates):
        content = [data.inputs, data.target, data.timesteps]
        return ["states", _digest(content), str(data.buckets)]
    if isinstance(data, (list, tuple)):
        return ["batches", _digest(data)]
    return ["not compared", type(data).__qualname__]


def _digest(value: Any) -> str:
    """sha256 over all tensors in nested sequences and mappings, with their names, types and shapes."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}".encode())
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        else:  # whether it may be there is not decided here
            digest.update(type(value).__qualname__.encode())

    add(value)
    return digest.hexdigest()
