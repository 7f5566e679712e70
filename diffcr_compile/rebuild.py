"""FROZEN graphs in torch, made again from an artifact and the dense model that it was compiled from."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile.attachments import prepared
from diffcr_compile.calibrate.trained import own_weights
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import ArtifactError, DiffCRError, UsageError, plain_text
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.parity import compare
from diffcr_compile.full_float32 import full_float32
from diffcr_compile.manifest import Manifest, read_manifest, verify_artifact
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.program import DiTGraph, Program, is_routing_weight, rebuild_call, run_flat
from diffcr_compile.recipe import FIXED_FILE, Recipe, read_recipe
from diffcr_compile.schedule import TokenSchedule
from diffcr_compile.signature import CallSignature
from diffcr_compile.stages import captured, routed_program

# The same graphs on the same kind of executor: only the order of sums may differ.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """Graphs around the dense model.

    Attributes:
        captured: the dense model itself, with its own weights.
        frozen: one graph per timestep bucket, with what was learned.
    """

    captured: Program
    frozen: tuple[DiTGraph, ...]


def rebuild(folder: Path, model: nn.Module) -> Rebuilt:
    """The artifact's FROZEN graphs around `model`, one per timestep bucket.

    The model is captured and routed as the artifact says, gets the learned routers and weights, and must
    then give the artifact's golden outputs. The model itself stays as it is.

    Args:
        folder: the artifact.
        model: the dense model, with the weights that the artifact was compiled from.

    Raises:
        ArtifactError: the artifact is damaged or has no recipe.
        UsageError: this is not the model that it was compiled from.
    """
    manifest, recipe = read_manifest(folder), read_recipe(folder)
    verify_artifact(folder, manifest)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        dense = _captured(folder, manifest, recipe, model, device)
        routed = _routed(folder, recipe, dense)
        schedule = read_schedule(folder)
        frozen = [
            run_passes(routed, [FreezeKeptTokens(schedule, bucket), RemoveFullBlocks()])
            for bucket in range(len(schedule.buckets))
        ]
        for bucket, program in enumerate(frozen):
            _check_golden(folder, manifest, bucket, program, device)
    except ArtifactError:
        raise
    except DiffCRError as error:
        raise UsageError(
            f"{folder} was not compiled from this {type(model).__name__}: {plain_text(error)}. Pass the "
            f"dense {recipe.class_name} with the weights that it was compiled from.",
            code="DCR-U051",
        ) from error
    return Rebuilt(dense, tuple(program.module for program in frozen))


def _captured(
    folder: Path, manifest: Manifest, recipe: Recipe, model: nn.Module, device: torch.device
) -> Program:
    routing = RoutingConfig(**recipe.routing)
    call = _example_call(folder, manifest, recipe, model, device)
    return captured(prepared(model, routing.fuse_adapters), call, routing, model)


def _routed(folder: Path, recipe: Recipe, dense: Program) -> Program:
    """The model routed as it was, with what was learned."""
    routed = routed_program(dense, RoutingConfig(**recipe.routing), seed=0)
    put_learned(folder / recipe.learned, routed)
    return routed


def read_schedule(folder: Path) -> TokenSchedule:
    """The schedule that an artifact's graphs were frozen at."""
    return TokenSchedule.from_json(
        json.loads((folder / "model/schedule.json").read_text(encoding="utf-8"))
    )


def put_learned(path: Path, routed: Program) -> dict[str, Tensor]:
    """Give a ROUTED program routers and weights that a calibration left; the user's weights stay as they are.

    Args:
        path: safetensors, names as in the program.
        routed: of the same model, at any number of tokens.

    Returns:
        What the file holds.

    Raises:
        UsageError: the program has no such weight.
    """
    learned = load_file(path)
    if not all(is_routing_weight(routed, name) for name in learned):
        own_weights(routed.module)
    parameters = dict(routed.module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in learned.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise UsageError(f"it has no weight {name} of shape {tuple(tensor.shape)}")
            parameters[name].copy_(tensor)
    return dict(learned)


def _example_call(
    folder: Path, manifest: Manifest, recipe: Recipe, model: nn.Module, device: torch.device
) -> dict[str, Any]:
    """The arguments of the model's forward: golden inputs, and what was fixed."""
    fixed = load_file(folder / FIXED_FILE) if (folder / FIXED_FILE).exists() else {}
    constants = []
    for row in recipe.constants:
        path = tuple(row["path"])
        if "text" in row:
            raise ArtifactError(
                f"the argument {'.'.join(map(str, path))} was {row['text']} when {folder} was made, which "
                "a file cannot say. Use dcr.route and dcr.freeze in the program that has it.",
                code="DCR-A014",
            )
        value = fixed[row["tensor"]].to(device) if "tensor" in row else row["value"]
        constants.append((path, tuple(value) if row.get("is_tuple") else value))
    signature = CallSignature(
        tuple(inspect.signature(model.forward).parameters.values()),
        {name: tuple(path) for name, path in recipe.inputs.items()},
        tuple(constants),
        pytree.tree_structure(None),
    )
    return rebuild_call(signature, _golden_inputs(folder, manifest, 0, device))


def _golden_inputs(
    folder: Path, manifest: Manifest, bucket: int, device: torch.device
) -> Mapping[str, Tensor]:
    arrays, _ = read_golden(folder / manifest.buckets[bucket]["golden"])
    found = {}
    for spec in manifest.inputs:
        tensor = torch.from_numpy(arrays[spec["name"]].copy())
        if spec["dtype"].startswith(
            "complex"
        ):  # golden files have them as pairs of real numbers
            tensor = torch.view_as_complex(tensor)
        found[spec["name"]] = tensor.to(device, getattr(torch, spec["dtype"]))
    return found


@full_float32()  # as the golden outputs were computed
@torch.no_grad()
def _check_golden(
    folder: Path, manifest: Manifest, bucket: int, program: Program, device: torch.device
) -> None:
    """Raise unless a rebuilt graph gives the golden outputs."""
    found = run_flat(program, _golden_inputs(folder, manifest, bucket, device))
    _, expected = read_golden(folder / manifest.buckets[bucket]["golden"])
    row = compare("golden -> FROZEN", found, expected, TOLERANCE, bucket)
    if not row.passed:
        raise UsageError(
            f"in timestep bucket {bucket} its output differs from the golden one by {row.max_abs:.1e}, "
            f"allowed {TOLERANCE:.0e}"
        )
