"""Where a MODEL on the command line comes from."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from diffcr_compile.calibrate.data import Conditions
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.vector_math import settle_vector_math


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with what the compiler needs beside it.

    Attributes:
        model: in evaluation mode.
        inputs: example inputs.
        conditions: draws the inputs of rollouts, see ``api.calibrate``; None for the example's.
        name: for reports.
    """

    model: nn.Module
    inputs: Any
    conditions: Conditions | None
    name: str


def load_case(source: str, inputs: Path | None) -> Case:
    """The model that a MODEL argument names.

    Args:
        source: ``demo``, ``python:<module>:<factory>`` or ``diffusers:<folder>[#component]``.
        inputs: safetensors with example inputs; needed for ``diffusers:`` only.

    Raises:
        UsageError: the source cannot be understood or found.
    """
    settle_vector_math()
    kind, _, rest = source.partition(":")
    if source == "demo":
        return _demo_case()
    if kind == "python" and rest.count(":") == 1:
        return _python_case(*rest.split(":"))
    if kind == "diffusers" and rest:
        return _diffusers_case(rest, inputs)
    raise UsageError(
        f"MODEL must be demo, python:<module>:<factory> or diffusers:<folder>[#component], got {source!r}"
    )


def _demo_case() -> Case:
    from diffcr_compile.reference import demo

    return Case(demo.load_reference_dit(), demo.example_inputs(), demo.draw_labels, demo.NAME)


def _python_case(module_name: str, factory_name: str) -> Case:
    """A factory returns (model, example_inputs) or (model, example_inputs, conditions)."""
    sys.path.insert(0, "")  # a file beside the user is what they mean by its name
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"python:{module_name}:{factory_name} cannot be imported: {error}"
        ) from error
    finally:
        sys.path.remove("")
    made = factory()
    if (
        not isinstance(made, tuple)
        or len(made) not in (2, 3)
        or not isinstance(made[0], nn.Module)
    ):
        raise UsageError(
            f"{module_name}:{factory_name} must return (model, example_inputs) or "
            f"(model, example_inputs, conditions), got {type(made).__name__}"
        )
    return Case(made[0].eval(), made[1], made[2] if len(made) == 3 else None, factory_name)


def _diffusers_case(rest: str, inputs: Path | None) -> Case:
    folder, _, component = rest.partition("#")
    if inputs is None:
        raise UsageError(
            "diffusers: needs --inputs, a safetensors file with one tensor per argument of forward"
        )
    if not Path(folder).is_dir():
        raise UsageError(f"the folder {folder} does not exist; models are read from disk only")
    if not inputs.is_file():
        raise UsageError(f"the file {inputs} does not exist")
    model = _load_component(Path(folder), component)
    tensors: Mapping[str, Any] = load_file(inputs)
    return Case(model.eval(), dict(tensors), None, f"{type(model).__name__} from {folder}")


def _load_component(folder: Path, component: str) -> nn.Module:
    from diffusers import AutoModel, DiffusionPipeline

    try:
        if (folder / "model_index.json").exists():
            pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
            model = getattr(pipeline, component or "transformer", None)
        else:
            model = AutoModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no model or pipeline saved by diffusers: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{folder} has no component {component or 'transformer'!r}"
        )
    return model
