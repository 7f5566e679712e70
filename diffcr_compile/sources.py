"""Where a MODEL on the command line comes from."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffcr_compile.calibrate.data import Conditions
from diffcr_compile.calibrate.pipelines import FEW_STEPS, PipelineRuns, open_pipeline
from diffcr_compile.data_files import read_json, read_yaml
from diffcr_compile.errors import EnvironmentMissingError, UnsupportedModelError, UsageError
from diffcr_compile.vector_math import settle_vector_math

# A model is read from its folder only, as data: no download, no code that it brings, no pickle.
ONLY_DATA = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with what the compiler needs beside it.

    Attributes:
        model: in evaluation mode; or a pipeline, opened.
        inputs: example inputs; None of a pipeline, which has its own.
        conditions: draws the inputs of rollouts, see ``api.calibrate``; None for the example's.
        name: for reports.
    """

    model: nn.Module | PipelineRuns
    inputs: Any
    conditions: Conditions | None
    name: str


def load_case(
    source: str,
    inputs: Path | None,
    pipeline_inputs: Path | None = None,
    steps: int = FEW_STEPS,
) -> Case:
    """The model that a MODEL argument names.

    Args:
        source: ``demo``, ``python:<module>:<factory>`` or ``diffusers:<folder>[#component]``.
        inputs: safetensors; for a single model of ``diffusers:`` its example inputs, for a pipeline
            those arguments of its call that are tensors.
        pipeline_inputs: YAML or JSON with the arguments of a pipeline's call, or a list of such dicts.
        steps: sampling steps of a pipeline, where the arguments name none.

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
        return _diffusers_case(rest, inputs, pipeline_inputs, steps)
    raise UsageError(
        f"MODEL must be demo, python:<module>:<factory> or diffusers:<folder>[#component], got {source!r}",
        code="DCR-U001",
    )


def _demo_case() -> Case:
    load_diffusers()
    from diffcr_compile.reference import demo

    return Case(demo.load_reference_dit(), demo.example_inputs(), demo.draw_labels, demo.NAME)


def _python_case(module_name: str, factory_name: str) -> Case:
    """A factory returns (model, example_inputs) or (model, example_inputs, conditions)."""
    sys.path.insert(0, "")  # a file beside the user is what they mean by its name
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"python:{module_name}:{factory_name} cannot be imported: {error}", code="DCR-U002"
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
            f"(model, example_inputs, conditions), got {type(made).__name__}",
            code="DCR-U003",
        )
    return Case(made[0].eval(), made[1], made[2] if len(made) == 3 else None, factory_name)


def _diffusers_case(
    rest: str, inputs: Path | None, pipeline_inputs: Path | None, steps: int
) -> Case:
    name, _, component = rest.partition("#")
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(
            f"the folder {folder} does not exist; models are read from disk only "
            "(a single model with --inputs, a pipeline with --pipeline-inputs)",
            code="DCR-U004",
        )
    tensors = _read_tensors(inputs)
    if (folder / "model_index.json").exists() and (pipeline_inputs or inputs is None):
        runs = open_pipeline(
            _load_pipeline(folder), _calls(pipeline_inputs, tensors), component or None, steps
        )
        return Case(runs, None, None, f"{type(runs.model).__name__} from {folder}")
    if inputs is None or pipeline_inputs is not None:
        raise UsageError(
            f"{folder} is a single model: it needs --inputs, a safetensors file with one tensor per "
            "argument of forward; --pipeline-inputs is for pipelines",
            code="DCR-U005",
        )
    model = _load_component(folder, component)
    return Case(model.eval(), tensors, None, f"{type(model).__name__} from {folder}")


def _read_tensors(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise UsageError(f"the file {path} does not exist", code="DCR-U006")
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(
            f"{path} is no safetensors file: {error}. Write it with safetensors.torch.save_file.",
            code="DCR-U006",
        ) from error


def _calls(path: Path | None, tensors: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The arguments of a pipeline's call, or of several, each with the tensors."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"the file {path} does not exist", code="DCR-U006")
    try:
        found = read_yaml(path)
    except ValueError as error:
        raise UsageError(
            f"{path} is neither YAML nor JSON: {error}", code="DCR-U007"
        ) from error
    calls = [found] if isinstance(found, dict) else found
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UsageError(
            f"{path} must hold the arguments of the pipeline's call by name, or a list of such, "
            f"found {type(found).__name__}",
            code="DCR-U008",
        )
    return [{**call, **tensors} for call in calls]


def _load_pipeline(folder: Path) -> Any:
    """A pipeline from disk; a component that was not saved is None."""
    diffusers = load_diffusers()
    index = _pipeline_index(folder)
    kind = _pipeline_class(index, folder)
    expected = {*inspect.signature(kind.__init__).parameters} - {"self", "args", "kwargs"}
    named = {name for name, value in index.items() if isinstance(value, list)}
    absent = {
        n: None for n in named | expected if not (folder / n).exists() and n not in index
    }
    absent |= {n: None for n in named if index[n][0] is None}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(folder), **ONLY_DATA, **absent)
    except ImportError as error:
        raise _missing(f"{folder} needs a package that is not here: {error}") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no pipeline that diffusers can load here: {error}"
        ) from error


def load_diffusers() -> Any:
    """The package diffusers.

    Raises:
        EnvironmentMissingError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise _missing(f"diffusers cannot be imported: {error}") from error


def _pipeline_class(index: Mapping[str, Any], folder: Path) -> Any:
    """The class of a saved pipeline, with all packages that it needs."""
    diffusers = load_diffusers()
    name = index["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise _missing(
            f"{folder} is a {name}, which diffusers {diffusers.__version__} does not have; the folder was saved with "
            f"{index.get('_diffusers_version', 'an unknown version')}"
        )
    try:
        # in the place of a class whose packages are missing stands one that names them in `_backends`
        diffusers.utils.requires_backends(kind, getattr(kind, "_backends", []))
    except ImportError as error:
        words = " ".join(str(error).split())
        raise _missing(f"{folder} cannot be read here: {words}") from error
    return kind


def _missing(message: str) -> EnvironmentMissingError:
    return EnvironmentMissingError(
        f"{message}. Install: pip install 'diffcr-compile[diffusers]'", code="DCR-E012"
    )


def _pipeline_index(folder: Path) -> dict[str, Any]:
    """Components by name, as a saved pipeline lists them."""
    path = folder / "model_index.json"
    try:
        index = read_json(path)
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}", code="DCR-U004") from error
    lists = (
        [value for value in index.values() if isinstance(value, list)]
        if isinstance(index, dict)
        else []
    )
    if (
        not isinstance(index, dict)
        or not isinstance(index.get("_class_name"), str)
        or not all(lists)
    ):
        raise UsageError(
            f"{path} is no index of a pipeline: it names no class of diffusers in _class_name, or a component "
            "without one. Save the pipeline again with save_pretrained.",
            code="DCR-U004",
        )
    return index


def _load_component(folder: Path, component: str) -> nn.Module:
    diffusers = load_diffusers()
    try:
        if (folder / "model_index.json").exists():
            model = getattr(_load_pipeline(folder), component or "transformer", None)
        else:
            model = diffusers.AutoModel.from_pretrained(str(folder), **ONLY_DATA)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no model or pipeline saved by diffusers: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{folder} has no component {component or 'transformer'!r}"
        )
    return model
