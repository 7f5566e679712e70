"""Where a MODEL on the command line comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcr_compile.calibrate.data import Conditions
from diffcr_compile.calibrate.pipelines import FEW_STEPS, PipelineRuns, open_pipeline
from diffcr_compile.data_files import read_json, read_yaml, short
from diffcr_compile.errors import (
    DiffCRError,
    EnvironmentMissingError,
    UnsupportedModelError,
    UsageError,
)
from diffcr_compile.opened import call_of
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
    bars: bool = True,
) -> Case:
    """The model that a MODEL argument names.

    Args:
        source: ``demo``, ``python:<module>:<factory>`` or ``diffusers:<folder>[#component]``.
        inputs: safetensors; for a single model of ``diffusers:`` its example inputs, for a pipeline
            those arguments of its call that are tensors.
        pipeline_inputs: YAML or JSON with the arguments of a pipeline's call, or a list of such dicts.
        steps: sampling steps of a pipeline, where the arguments name none.
        bars: whether diffusers may show how far loading has come.

    Raises:
        UsageError: the source cannot be understood or found.
    """
    settle_vector_math()
    kind, _, rest = source.partition(":")
    if kind == "diffusers" and not bars:  # nothing else is to wait for its import
        _without_bars()
    if kind in ("demo", "python"):
        _refuse_files(kind, inputs, pipeline_inputs)
    if source == "demo":
        return _demo_case()
    if kind == "python" and rest.count(":") == 1 and all(rest.split(":")):
        return _python_case(*rest.split(":"))
    if kind == "diffusers" and rest:
        return _diffusers_case(rest, inputs, pipeline_inputs, steps)
    raise UsageError(
        f"MODEL must be demo, python:<module>:<factory> or diffusers:<folder>[#component], got {source!r}",
        code="DCR-U001",
    )


def _without_bars() -> None:
    """Nothing of diffusers' on stderr; where it is not installed, whoever needs it says so."""
    with contextlib.suppress(ImportError):
        importlib.import_module("diffusers.utils.logging").disable_progress_bar()


def _refuse_files(kind: str, inputs: Path | None, pipeline_inputs: Path | None) -> None:
    given = {"--inputs": inputs, "--pipeline-inputs": pipeline_inputs}
    for option, path in given.items():
        if path is not None:
            own = "the demo has" if kind == "demo" else "a factory returns"
            raise UsageError(
                f"{option} {path} is for diffusers:<folder>; {own} example inputs of its own. Leave it out.",
                code="DCR-U006",
            )


def _demo_case() -> Case:
    load_diffusers()
    from diffcr_compile.reference import demo

    return Case(demo.load_reference_dit(), demo.example_inputs(), demo.draw_labels, demo.NAME)


def _python_case(module_name: str, factory_name: str) -> Case:
    """A factory returns (model, example_inputs) or (model, example_inputs, conditions)."""
    name = f"{module_name}:{factory_name}"
    sys.path.insert(0, "")  # a file beside the user is what they mean by its name
    try:
        with _of_the_user(f"python:{name} cannot be imported", "DCR-U002"):
            factory = getattr(importlib.import_module(module_name), factory_name)
    finally:
        sys.path.remove("")
    if not callable(factory):
        raise UsageError(
            f"{name} must be a function without arguments, got {type(factory).__name__}",
            code="DCR-U003",
        )
    with _of_the_user(f"{name}() did not return", "DCR-U003"):
        made = factory()
    wrong = _wrong_with(made)
    if wrong:
        raise UsageError(
            f"{name} must return (model, example_inputs) or (model, example_inputs, conditions), got {wrong}",
            code="DCR-U003",
        )
    return Case(made[0].eval(), made[1], made[2] if len(made) == 3 else None, factory_name)


@contextlib.contextmanager
def _of_the_user(what: str, code: str) -> Iterator[None]:
    """Code of the user's: what it prints stays out of our results, and what it raises is named as its own."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except DiffCRError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{what}: {type(error).__name__}: {error}{_place(error)}", code=code
        ) from error


def _place(error: BaseException) -> str:
    """The last line of the user's code that an error went through, as far as there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if frame.filename not in (__file__, importlib.__file__) and frame.filename[0] != "<"
    ]
    own = [frame for frame in theirs if "site-packages" not in frame.filename] or theirs
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _wrong_with(made: Any) -> str | None:
    """What a factory returned in the place of what it should; None where that is right."""
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        return type(made).__name__
    if not isinstance(made[0], nn.Module):
        return f"{type(made[0]).__name__} as model, not a torch.nn.Module"
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves(call_of(made[1]))):
        return f"example_inputs without any tensor: {short(made[1])}"
    if len(made) == 3 and made[2] is not None and not callable(made[2]):
        return f"{type(made[2]).__name__} as conditions, not a function"
    return None


def _diffusers_case(
    rest: str, inputs: Path | None, pipeline_inputs: Path | None, steps: int
) -> Case:
    name, _, component = rest.partition("#")
    folder = Path(name)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"the folder {folder} {what}; models are read from disk only "
            "(a single model with --inputs, a pipeline with --pipeline-inputs)",
            code="DCR-U004",
        )
    tensors = _read_tensors(inputs)
    calls = _calls(pipeline_inputs, tensors)
    if not any((folder / name).exists() for name in ("model_index.json", "config.json")):
        raise UsageError(
            f"{folder} is no model of diffusers: it has neither model_index.json (a pipeline) nor config.json "
            "(a single model). Name a folder that save_pretrained wrote.",
            code="DCR-U004",
        )
    if (folder / "model_index.json").exists() and (pipeline_inputs or inputs is None):
        runs = open_pipeline(_load_pipeline(folder), calls, component or None, steps)
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
    _check_file(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(
            f"{path} is no safetensors file: {error}. Write it with safetensors.torch.save_file.",
            code="DCR-U006",
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder, not a file" if path.exists() else "does not exist"
        raise UsageError(f"the file {path} {what}", code="DCR-U006")


def _calls(path: Path | None, tensors: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The arguments of a pipeline's call, or of several, each with the tensors."""
    if path is None:
        return None
    _check_file(path)
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
