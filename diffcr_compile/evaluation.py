"""The user's own measure of quality: taken of every artifact once, and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from diffcr_compile.data_files import read_json, short
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import MANIFEST_FILE, sha256_file
from diffcr_compile.runtime import load
from diffcr_compile.runtime.dense import DenseRunner
from diffcr_compile.workspace import Workspace, fingerprint

Evaluate = Callable[[Callable[..., Any], Callable[..., Any], Path], Mapping[str, Any]]
# What the report shows; anything else that JSON can hold may stand beside it.
WANTED: dict[str, type] = {
    "metric": str,
    "dense": Real,
    "compressed": Real,
    "num_samples": int,
}


def evaluated(space: Workspace, evaluate: Evaluate | None) -> dict[str, Any] | None:
    """What `evaluate` says about the artifact in the folder, or has said about it before.

    An artifact that was made anew is evaluated anew; so is one whose `evaluate` has another name or, if it is a dataclass with
    ``__call__``, other fields.

    Raises:
        UsageError: what it returned is not what the report needs; nothing is kept of it.
        ArtifactError: what was kept cannot be read.
    """
    if evaluate is None:
        return None
    path = space.subfolder("report") / "quality.json"
    key = fingerprint(sha256_file(space.folder / MANIFEST_FILE), _identity(evaluate))
    if not (space.finished("quality", key) and path.exists()):
        with space.stage("quality", key):
            runner = load(space.folder)
            dense = DenseRunner(space.folder / "baseline/dense.onnx")
            found = _checked(evaluate(dense, runner, space.folder / "report"))
            try:
                write_json_atomic(path, found)
            except (TypeError, ValueError) as error:
                raise _wrong(f"something that JSON cannot hold: {error}") from error
    try:
        return _checked(read_json(path))
    except (ValueError, UsageError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); it was changed from outside. Delete it to have the quality measured again.",
            code="DCR-A000",
        ) from error


def _identity(evaluate: Any) -> list[str]:
    name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    fields = repr(evaluate) if dataclasses.is_dataclass(evaluate) else ""
    return [name, fields]


def _checked(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise _wrong(f"a {type(found).__name__}")
    for name, kind in WANTED.items():
        if name not in found:
            raise _wrong(f"no {name!r}, only {sorted(map(str, found))}")
        if not isinstance(found[name], kind):
            raise _wrong(f"{name!r} = {short(found[name])}, a {type(found[name]).__name__}")
    return dict(found)


def _wrong(what: str) -> UsageError:
    return UsageError(
        f"evaluate= returned {what}. It returns a mapping with metric (text), dense and compressed (numbers, such as "
        "float(tensor)) and num_samples (int), and whatever else JSON can hold. The artifact is finished: mend evaluate "
        "and run the same call again, only the quality is measured then.",
        code="DCR-U081",
    )
