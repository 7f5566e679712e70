"""Which engines an artifact becomes: their ONNX files, and the optimization profiles of each.

Two modes give the same results. ``per_bucket`` builds one static engine per graph, each with its own copy
of the weights. ``profiles`` builds as few engines as the graphs allow, mostly one: the kept tokens of a
block are the length of a 1-D input there, and each timestep bucket is a profile with min = opt = max.

Standard library only: this file goes on the device with the runtime.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol, get_args

from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest

EngineMode = Literal["profiles", "per_bucket"]
ENGINE_MODES: tuple[EngineMode, ...] = get_args(EngineMode)
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
    """One optimization profile, with min = opt = max.

    Attributes:
        buckets: the timestep buckets that run in it.
        shapes: input -> shape, of the inputs whose lengths the graph leaves open; none of a static
            graph. What such an input holds is never read, only how long it is.
    """

    buckets: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """One engine.

    Attributes:
        name: of its file, without an ending.
        onnx: its graph, relative to the artifact.
        profiles: in the order of their numbers.
    """

    name: str
    onnx: str
    profiles: tuple[ProfileSpec, ...]


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """All engines of an artifact; every timestep bucket runs in exactly one profile of one of them."""

    mode: EngineMode
    engines: tuple[EngineSpec, ...]

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ArtifactError(
                f"the plan of engines is wrong: {problem}. Make it anew from the artifact with "
                "diffcr build.",
                code="DCR-A008",
            )

    def place(self, bucket: int) -> tuple[EngineSpec, int]:
        """The engine of a timestep bucket, and the number of its profile there."""
        for engine in self.engines:
            for number, profile in enumerate(engine.profiles):
                if bucket in profile.buckets:
                    return engine, number
        buckets = sum(len(p.buckets) for engine in self.engines for p in engine.profiles)
        raise UsageError(f"there is no timestep bucket {bucket}, the plan has {buckets}")

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "engines": [
                {
                    "name": engine.name,
                    "onnx": engine.onnx,
                    "profiles": [
                        {
                            "buckets": list(profile.buckets),
                            "shapes": {n: list(shape) for n, shape in profile.shapes.items()},
                        }
                        for profile in engine.profiles
                    ],
                }
                for engine in self.engines
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> EnginePlan:
        """The plan that `to_json` wrote.

        Raises:
            ArtifactError: the data has another form, or no bucket has exactly one place; says where.
        """
        top = _keys(data, ("mode", "engines"), "the plan")
        return cls(
            top["mode"], tuple(_engine(row) for row in _rows(top["engines"], "engines"))
        )


class BuildTarget(Protocol):
    """What of a target decides the mode; ``diffcr_compile.planning.targets.Target`` has it."""

    @property
    def name(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def bugs(self) -> Sequence[Any]: ...


@dataclasses.dataclass(frozen=True)
class ModeChoice:
    """A mode, and why it and not the other."""

    mode: EngineMode
    reason: str


def plan_engines(manifest: Manifest, mode: EngineMode) -> EnginePlan:
    """The engines of an artifact in one mode.

    Raises:
        UsageError: an unknown mode, or the artifact was exported without graphs for it.
    """
    if mode not in ENGINE_MODES:
        raise UsageError(f"engine mode {mode!r} is unknown; use one of {list(ENGINE_MODES)}")
    if mode == "per_bucket":
        graphs: dict[str, list[int]] = {}
        for bucket in manifest.buckets:
            graphs.setdefault(bucket["onnx"], []).append(bucket["index"])
        return EnginePlan(
            mode,
            tuple(
                EngineSpec(_stem(graph), graph, (ProfileSpec(tuple(buckets), {}),))
                for graph, buckets in graphs.items()
            ),
        )
    if not manifest.profile_graphs:
        raise UsageError(
            "this artifact has no graphs for the engine mode 'profiles'. Export it again with "
            "export.profiles set to true, or build with the mode 'per_bucket'."
        )
    return EnginePlan(mode, tuple(_profiled(row, manifest) for row in manifest.profile_graphs))


def choose_mode(manifest: Manifest, target: BuildTarget) -> ModeChoice:
    """The mode for ``auto``: right results first, then memory.

    Raises:
        UsageError: nothing is built for this target.
    """
    if not target.engine.startswith("tensorrt"):
        raise UsageError(
            f"{target.name} runs the ONNX graphs as they are with {target.engine}; no engine is "
            "built for it. Name a target with TensorRT."
        )
    separate = plan_engines(manifest, "per_bucket")
    count = len(separate.engines)
    if count == 1:
        return ModeChoice("per_bucket", "all timestep buckets run the same static graph")
    if not manifest.profile_graphs:
        return ModeChoice("per_bucket", "the artifact was exported without profiles graphs")
    shared = plan_engines(manifest, "profiles")
    if len(shared.engines) == count:
        return ModeChoice(
            "per_bucket", "the buckets' graphs differ by more than numbers of kept tokens"
        )
    bugs = [bug for bug in target.bugs if bug.when == "dynamic_shapes"]
    if bugs:
        threads = ", ".join(dict.fromkeys(t for bug in bugs for t in bug.threads))
        return ModeChoice(
            "per_bucket",
            f"{target.name} is known for wrong results where a graph leaves lengths open "
            f"({threads}){_memory(manifest, target, count)}",
        )
    weights = _gigabytes(len(shared.engines) * _weight_bytes(manifest))
    return ModeChoice(
        "profiles",
        f"weights lie in memory {len(shared.engines)}× ({weights}) and not {count}×, and no wrong "
        f"results with open lengths are known of {target.name}",
    )


def _memory(manifest: Manifest, target: BuildTarget, count: int) -> str:
    """What several copies of the weights mean for the target's memory; "" if they are few."""
    need = count * _weight_bytes(manifest)
    if target.memory_bytes is None or need < target.memory_bytes / 2:
        return ""
    return (
        f"; {count} engines hold {_gigabytes(need)} of weights and the device has "
        f"{_gigabytes(target.memory_bytes)}: keep one engine loaded at a time"
    )


def _weight_bytes(manifest: Manifest) -> int:
    return int(manifest.files[manifest.weights]["bytes"])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _profiled(row: Mapping[str, Any], manifest: Manifest) -> EngineSpec:
    """The engine of one profiles graph: one profile per set of lengths."""
    profiles: dict[tuple[int, ...], list[int]] = {}
    inputs: Mapping[str, str] = row["kept_inputs"]
    for bucket in row["buckets"]:
        kept = tuple(int(manifest.schedule[block][bucket]) for block in inputs.values())
        profiles.setdefault(kept, []).append(bucket)
    return EngineSpec(
        _stem(row["onnx"]),
        row["onnx"],
        tuple(
            ProfileSpec(tuple(buckets), {n: (k,) for n, k in zip(inputs, kept, strict=True)})
            for kept, buckets in profiles.items()
        ),
    )


def _stem(path: str) -> str:
    return PurePosixPath(path).stem


def _problem(plan: EnginePlan) -> str | None:
    """What is wrong with a plan, in words; None if nothing is."""
    if plan.mode not in ENGINE_MODES:
        return f"the mode is {plan.mode!r}, expected one of {list(ENGINE_MODES)}"
    names = [engine.name for engine in plan.engines]
    if not names or len(set(names)) < len(names):
        return f"the names of its engines are {names}, expected at least one and each once"
    for engine in plan.engines:
        problem = _engine_problem(engine)
        if problem:
            return f"engine {engine.name!r}: {problem}"
    buckets = [b for engine in plan.engines for p in engine.profiles for b in p.buckets]
    if sorted(buckets) != list(range(len(buckets))):
        return f"its timestep buckets are {sorted(buckets)}, expected each of 0, 1, ... once"
    return None


def _engine_problem(engine: EngineSpec) -> str | None:
    if not _NAME.fullmatch(engine.name):
        return "the name must be letters, digits and underscores: files are named after it"
    path = PurePosixPath(engine.onnx)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in engine.onnx
        or path.suffix != ".onnx"
    ):
        return f"{engine.onnx!r} is no path of an ONNX file inside the artifact"
    if not engine.profiles or not all(profile.buckets for profile in engine.profiles):
        return "it needs a profile, and each profile a timestep bucket"
    first = engine.profiles[0]
    if len(engine.profiles) > 1 and not first.shapes:
        return f"a static graph has one profile, this has {len(engine.profiles)}"
    for number, profile in enumerate(engine.profiles):
        if set(profile.shapes) != set(first.shapes):
            return (
                f"profile {number} is for the inputs {sorted(profile.shapes)}, profile 0 for "
                f"{sorted(first.shapes)}"
            )
        for name, shape in profile.shapes.items():
            if not shape or not all(type(size) is int and size > 0 for size in shape):
                return (
                    f"profile {number}: {name} has the shape {shape}, expected sizes above 0"
                )
    return None


def _engine(row: Any) -> EngineSpec:
    row = _keys(row, ("name", "onnx", "profiles"), "an engine")
    if not isinstance(row["name"], str) or not isinstance(row["onnx"], str):
        raise _damaged(f"name and onnx of an engine must be text, found {row!r:.200}")
    profiles = _rows(row["profiles"], f"profiles of {row['name']!r}")
    return EngineSpec(
        row["name"], row["onnx"], tuple(_profile(p, row["name"]) for p in profiles)
    )


def _profile(row: Any, engine: str) -> ProfileSpec:
    row = _keys(row, ("buckets", "shapes"), f"a profile of {engine!r}")
    shapes, buckets = row["shapes"], _rows(row["buckets"], f"buckets of {engine!r}")
    if not isinstance(shapes, dict) or not all(type(bucket) is int for bucket in buckets):
        raise _damaged(
            f"a profile of {engine!r} must have numbers as buckets and shapes by input, found {row!r:.200}"
        )
    return ProfileSpec(
        tuple(buckets),
        {name: tuple(_rows(shape, f"shape of {name!r}")) for name, shape in shapes.items()},
    )


def _keys(row: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(row, dict) or set(row) != set(names):
        raise _damaged(f"{what} must have the keys {list(names)}, found {row!r:.200}")
    return row


def _rows(value: Any, what: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _damaged(f"{what} must be a list, found {value!r:.200}")
    return list(value)


def _damaged(problem: str) -> ArtifactError:
    return ArtifactError(
        f"the plan of engines cannot be read: {problem}. Make it anew from the artifact with "
        "diffcr build.",
        code="DCR-A008",
    )
