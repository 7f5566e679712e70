"""The YAML files that facts about targets stand in: their keys, and how they are read.

A folder of targets holds ``<any name>.yaml``, one target each; ``importers/``, what the reader of a
version takes; and ``bugs/``, what is known to go wrong. The package's own is ``export/targets``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffcr_compile.data_files import read_yaml, short
from diffcr_compile.did_you_mean import did_you_mean
from diffcr_compile.errors import UsageError

Engine = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
SHIPPED = Path(__file__).resolve().parent.parent / "export" / "targets"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OperatorGroup(_Facts):
    """Operators that take the same types as their first input."""

    types: tuple[str, ...]
    names: str = Field(description="ONNX names, with blanks between them")


class Spelling(_Facts):
    """A way to use an operator that is refused; with no condition, every use of it.

    Attributes:
        id: how the rule is called in findings.
        op: ONNX operators, with blanks between them.
        reason: for people.
        attribute: the condition is on this attribute ...
        present: ... that it is there at all ...
        allowed: ... or that it is there with another value than these.
        types: types of the first input that are refused.
        output_types: types of the first output that are refused.
        constant_inputs: inputs that must be initializers or constants, if they are given.
        max_outputs: more outputs than this are refused.
        aten: ATen operators that are exported so, for a forecast from a torch graph.
    """

    id: str
    op: str
    reason: str
    attribute: str | None = None
    present: bool = False
    allowed: tuple[str | int, ...] | None = None
    types: tuple[str, ...] = ()
    output_types: tuple[str, ...] = ()
    constant_inputs: tuple[int, ...] = ()
    max_outputs: int | None = None
    aten: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        """The operators it is about."""
        return tuple(self.op.split())


class ImporterFile(_Facts):
    """What the reader of ONNX of one version takes, on top of `extends`."""

    name: str
    extends: str | None = None
    min_opset: int | None = None
    max_opset: int | None = None
    max_ir: int | None = None
    max_rank: int | None = None
    max_topk: int | None = None
    integers: tuple[str, ...] | None = None
    cast_down: tuple[str, ...] | None = None
    operators: tuple[OperatorGroup, ...] = ()
    removed: tuple[str, ...] = ()
    lifted: tuple[str, ...] = Field(
        default=(), description="rules of `extends` that no longer hold"
    )
    forbidden: tuple[Spelling, ...] = ()


class KnownBug(_Facts):
    """Wrong results that were reported.

    Attributes:
        id: how it is called in findings.
        engine: of which runtime.
        first: the first version that it was seen in.
        fixed: the first version that it was not seen in; None if none is known.
        sm: compute capabilities; none for all.
        when: ``dynamic_shapes``, ``large_tensors`` (more than 2^31 - 1 elements) or a type that the
            graph must have; None where it is not known what a graph must have.
        effect: what goes wrong.
        remedy: what to do.
        threads: where it was reported.
    """

    id: str
    engine: Engine
    first: str
    fixed: str | None = None
    sm: tuple[int, ...] = ()
    when: str | None = None
    effect: str
    remedy: str
    threads: tuple[str, ...] = Field(min_length=1)

    def concerns(self, engine: str, version: str, sm: Iterable[int]) -> bool:
        """Whether it is about this version on one of these compute capabilities."""
        if engine != self.engine or as_numbers(version) < as_numbers(self.first):
            return False
        if self.fixed is not None and as_numbers(version) >= as_numbers(self.fixed):
            return False
        return not self.sm or bool(set(self.sm) & set(sm))


class TargetFile(_Facts):
    """One target; see :class:`diffcr_compile.planning.targets.Target`."""

    name: str
    aliases: tuple[str, ...] = ()
    device: str
    engine: Engine
    version: str
    importer: str
    sm: tuple[int, ...] = ()
    memory_bytes: int | None = Field(default=None, gt=0)
    unified_memory: bool
    dtypes: tuple[str, ...] = Field(min_length=1)
    fused_attention: tuple[str, ...] = ()
    build_memory: float | None = Field(default=None, gt=0)
    profile_layout: Literal["pinned", "spanning"] = "pinned"
    macs_per_byte: float | None = Field(default=None, gt=0)
    remarks: tuple[str, ...] = ()


_Kind = TypeVar("_Kind", bound=_Facts)


def read_facts(kind: type[_Kind], path: Path) -> _Kind:
    """One object from a YAML file.

    Raises:
        UsageError: no such file, no YAML, an unknown or missing key, a value out of range.
    """
    return _checked(kind, _read(path), path)


def read_list(kind: type[_Kind], path: Path) -> tuple[_Kind, ...]:
    """Several objects from a YAML file that holds a list; errors as :func:`read_facts`."""
    data = _read(path)
    if not isinstance(data, list):
        raise UsageError(
            f"{path} must hold a list, it holds {type(data).__name__}", code="DCR-U037"
        )
    return tuple(_checked(kind, item, path) for item in data)


def as_numbers(version: str) -> tuple[int, ...]:
    """``"10.3"`` -> (10, 3)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(
            f"{path} is not a file; a target is described in a YAML file", code="DCR-U037"
        )
    try:
        return read_yaml(path)
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}", code="DCR-U037") from error


def _checked(kind: type[_Kind], data: Any, path: Path) -> _Kind:
    if not isinstance(data, Mapping):
        raise UsageError(
            f"{path}: expected keys and values, found {type(data).__name__}", code="DCR-U037"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(dict(e)) for e in error.errors())
        raise UsageError(f"{path}: {problems}", code="DCR-U037") from None


def _problem(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (found {short(error['input'])})"
    kinds: tuple[type[_Facts], ...] = (
        TargetFile,
        ImporterFile,
        KnownBug,
        Spelling,
        OperatorGroup,
    )
    known = [field for kind in kinds for field in kind.model_fields]
    return f"unknown key {where!r}{did_you_mean(str(error['loc'][-1]), known)}"
