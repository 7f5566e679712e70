"""Write ``model/recipe.json`` and the tensors that it names, from FROZEN programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.program import Program, router_name, selector_name
from diffcr_compile.recipe import FIXED_FILE, LEARNED_FILE, Recipe, write_recipe
from diffcr_compile.tensor_file import write_tensors


def write_recipe_files(
    folder: Path,
    frozen: Sequence[Program],
    learned: str | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> None:
    """Write the recipe of FROZEN programs; nothing if nobody knows which model they come from.

    Args:
        folder: an artifact's folder, or one that becomes it.
        frozen: one program per timestep bucket.
        learned: relative path of a file that holds routers and changed weights already.
        guidance: see :class:`diffcr_compile.recipe.Recipe`.
    """
    program, origin = frozen[0], frozen[0].origin
    if origin is None:
        return
    if learned is None:
        write_tensors(folder / LEARNED_FILE, _learned(frozen, origin.captured))
    fixed = program.fixed_inputs
    if fixed:
        write_tensors(folder / FIXED_FILE, {n: t.detach().clone() for n, t in fixed.items()})
    model = origin.captured
    parameter = next(iter(model.parameters()), torch.empty(0))
    recipe = Recipe(
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        inputs={name: list(path) for name, path in program.signature.inputs.items()},
        constants=[_constant(path, value) for path, value in program.signature.constants],
        routing=origin.routing.model_dump(mode="json"),
        learned=learned or LEARNED_FILE,
        config=_diffusers_config(model),
        output=_output_class(model),
        dtype=str(parameter.dtype).removeprefix("torch."),
        guidance=guidance,
    )
    write_recipe(folder, recipe)


def _learned(frozen: Sequence[Program], dense: nn.Module) -> dict[str, Tensor]:
    """Routers under their ROUTED names, and weights that are not the dense model's own."""
    own = dict(dense.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for program in frozen:
        routers = {router_name(b.name): selector_name(b.name) for b in program.blocks}
        for name, parameter in program.module.named_parameters():
            first, _, rest = name.partition(".")
            if first in routers:
                found[f"{routers[first]}.router.{rest}"] = parameter.detach().clone()
            elif name not in own or not _same(parameter, own[name]):
                found[name] = parameter.detach().clone()
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _same(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one.cpu(), two.cpu()))


def _constant(path: Sequence[int | str], value: Any) -> dict[str, Any]:
    """A constant argument: what JSON can say, or where it is; else only its text, which no one can call with."""
    row: dict[str, Any] = {"path": list(path)}
    if isinstance(value, Tensor):
        return {**row, "tensor": "_".join(map(str, path))}
    try:
        if json.loads(json.dumps(value)) == (
            list(value) if isinstance(value, tuple) else value
        ):
            return {**row, "value": value, "is_tuple": isinstance(value, tuple)}
    except (TypeError, ValueError):
        pass
    return {**row, "text": f"{type(value).__name__}: {value}"}


def _diffusers_config(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of a model of diffusers, as it saves it."""
    to_json = getattr(model, "to_json_string", None)
    if to_json is None or not hasattr(model, "register_to_config"):
        return None
    config: dict[str, Any] = json.loads(to_json())
    return config


def _output_class(model: nn.Module) -> str | None:
    """The one output class of diffusers that the model's module knows; None if there are several."""
    module = sys.modules.get(type(model).__module__)
    found = {
        f"{value.__module__}.{value.__qualname__}"
        for value in vars(module).values()
        if isinstance(value, type)
        and any(base.__name__ == "BaseOutput" for base in value.__mro__[1:])
    }
    return found.pop() if len(found) == 1 else None
