"""``model/recipe.json``: how the model is called, and how torch makes FROZEN again from the dense model.

ONNX Runtime and TensorRT do not need it. The drop-in transformer of a pipeline reads from it what stands
around the graphs (config, signature, guidance); ``rebuild.py`` reads the rest. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.errors import ArtifactError

RECIPE_FILE = "model/recipe.json"
LEARNED_FILE = "model/learned.safetensors"
FIXED_FILE = "model/fixed.safetensors"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an artifact's graphs were made from.

    Attributes:
        model_class: dotted name of the dense model's class.
        inputs: graph input -> path into the arguments of the model's forward.
        constants: path and value of every other argument; a tensor's value is the name of a tensor in
            ``model/fixed.safetensors``.
        routing: the ``routing`` section of the settings.
        learned: relative path of the routers and of the weights that calibration changed.
        config: of a model of diffusers: its configuration; None for others.
        output: of a model of diffusers: dotted name of the class that its forward returns.
        dtype: of the model's weights.
        guidance: None, or how classifier-free guidance was built in: ``cfg`` and ``images``.
        schema_version: of this structure.
    """

    model_class: str
    inputs: Mapping[str, Sequence[int | str]]
    constants: Sequence[Mapping[str, Any]]
    routing: Mapping[str, Any]
    learned: str
    config: Mapping[str, Any] | None
    output: str | None
    dtype: str
    guidance: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def class_name(self) -> str:
        """Without the module."""
        return self.model_class.rpartition(".")[2]


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write it into an artifact's folder."""
    write_json_atomic(folder / RECIPE_FILE, dataclasses.asdict(recipe))


def read_recipe(folder: Path) -> Recipe:
    """Read it. Whether the file is the one that was written says ``manifest.verify_artifact``.

    Raises:
        ArtifactError: there is none, or it has another form.
    """
    path = folder / RECIPE_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema version {data.get('schema_version')!r}")
        recipe = Recipe(**data)
        _check_form(recipe)
        return recipe
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: {folder} was made by a version that did not write it. Make the artifact "
            "anew, or use CompiledDenoiser(folder, dense_model), which needs none.",
            code="DCR-A014",
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Copy the artifact again, or make it anew.",
            code="DCR-A002",
        ) from error


def _check_form(recipe: Recipe) -> None:
    """Raise ValueError unless every entry has its type, and no path leads out of the artifact."""
    inputs, constants, optional = recipe.inputs, recipe.constants, (dict, type(None))
    forms = {
        "model_class": _is_dotted(recipe.model_class),
        "inputs": isinstance(inputs, dict) and all(_is_path(path) for path in inputs.values()),
        "constants": isinstance(constants, list)
        and all(_is_constant(row) for row in constants),
        "routing": isinstance(recipe.routing, dict),
        "learned": _is_weights_file(recipe.learned),
        "config": isinstance(recipe.config, optional),
        "output": recipe.output is None or _is_dotted(recipe.output),
        "dtype": isinstance(recipe.dtype, str),
        "guidance": isinstance(recipe.guidance, optional),
    }
    wrong = [name for name, is_right in forms.items() if not is_right]
    if wrong:
        raise ValueError(f"{wrong[0]} has the wrong form")


def _is_dotted(name: Any) -> bool:
    # a class inside of a function has <locals> in its name
    return isinstance(name, str) and re.fullmatch(r"[\w<>]+(\.[\w<>]+)*", name) is not None


def _is_weights_file(name: Any) -> bool:
    return isinstance(name, str) and bool(
        re.fullmatch(r"model/\w+\.safetensors", name, re.ASCII)
    )


def _is_path(path: Any) -> bool:
    return isinstance(path, list) and all(type(step) in (int, str) for step in path)


def _is_constant(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and _is_path(row.get("path"))
        and ("value" in row or "text" in row or isinstance(row.get("tensor"), str))
    )
