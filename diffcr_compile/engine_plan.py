"""Which engines an artifact becomes: their ONNX files, and the optimization profiles of each.

Two modes give the same results. ``per_bucket`` builds one static engine per graph, each with its own copy
of the weights. ``profiles`` builds as few engines as the graphs allow, mostly one: the kept tokens of a
block are the length of a 1-D input there. Laid out ``pinned``, each timestep bucket is a profile with
min = opt = max, and has its own kernels; ``spanning``, one profile goes from the least to the most kept
tokens of any bucket, and has one set of kernels.

Standard library only: this file goes on the device with the runtime.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol, get_args

from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest

EngineMode = Literal["profiles", "per_bucket"]
ENGINE_MODES: tuple[EngineMode, ...] = get_args(EngineMode)
# How the timestep buckets of one engine are laid out in optimization profiles.
ProfileLayout = Literal["pinned", "spanning"]
LAYOUT_REASONS: dict[ProfileLayout, str] = {
    "pinned": "a profile per timestep bucket, with kernels chosen for its lengths when it is built",
    "spanning": "one profile for all timestep buckets, with one set of kernels, which the runtime "
    "specialises for the lengths that it meets",
}
Shape = tuple[int, ...]
Bounds = tuple[Shape, Shape, Shape]  # min, opt, max
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class LengthsSpec:
    """Timestep buckets that run with the same lengths.

    Attributes:
        buckets: their numbers.
        shapes: input -> shape, of the inputs whose lengths the graph leaves open; none of a static
            graph. What such an input holds is never read, only how long it is.
    """

    buckets: tuple[int, ...]
    shapes: Mapping[str, Shape]

    def to_json(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"buckets": list(self.buckets), "shapes": shapes}


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
    """One optimization profile.

    Attributes:
        lengths: what is run in it: one entry where the profile is pinned, several where it spans.
    """

    lengths: tuple[LengthsSpec, ...]

    @property
    def buckets(self) -> tuple[int, ...]:
        """The timestep buckets that run in it."""
        return tuple(bucket for entry in self.lengths for bucket in entry.buckets)

    def bounds(self) -> dict[str, Bounds]:
        """Input -> smallest, typical and largest shape; the typical one is the median over the entries."""
        return {
            name: _bounds([entry.shapes[name] for entry in self.lengths])
            for name in self.lengths[0].shapes
        }


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

    def bounds(self) -> list[dict[str, Bounds]]:
        """Those of each profile; one empty entry for a static graph."""
        return [profile.bounds() for profile in self.profiles]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "onnx": self.onnx,
            "profiles": [[entry.to_json() for entry in p.lengths] for p in self.profiles],
        }

    @classmethod
    def from_json(cls, data: Any) -> EngineSpec:
        """The engine that `to_json` wrote.

        Raises:
            ArtifactError: the data has another form; says where.
        """
        row = _keys(data, ("name", "onnx", "profiles"), "an engine")
        if not isinstance(row["name"], str) or not isinstance(row["onnx"], str):
            raise _damaged(f"name and onnx of an engine must be text, found {row!r:.200}")
        profiles = _rows(row["profiles"], f"profiles of {row['name']!r}")
        return cls(row["name"], row["onnx"], tuple(_profile(p, row["name"]) for p in profiles))


class Place(NamedTuple):
    """Where a timestep bucket runs.

    Attributes:
        engine: in which engine.
        profile: number of the profile there.
        entry: number of its lengths in the profile.
    """

    engine: EngineSpec
    profile: int
    entry: int

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the inputs whose lengths are open."""
        return self.engine.profiles[self.profile].lengths[self.entry].shapes


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """All engines of an artifact; every timestep bucket has exactly one place in them."""

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

    def place(self, bucket: int) -> Place:
        """Where a timestep bucket runs."""
        for engine in self.engines:
            for number, profile in enumerate(engine.profiles):
                for entry, lengths in enumerate(profile.lengths):
                    if bucket in lengths.buckets:
                        return Place(engine, number, entry)
        buckets = sum(len(p.buckets) for engine in self.engines for p in engine.profiles)
        raise UsageError(f"there is no timestep bucket {bucket}, the plan has {buckets}")

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "engines": [engine.to_json() for engine in self.engines]}

    @classmethod
    def from_json(cls, data: Any) -> EnginePlan:
        """The plan that `to_json` wrote.

        Raises:
            ArtifactError: the data has another form, or no bucket has exactly one place; says where.
        """
        top = _keys(data, ("mode", "engines"), "the plan")
        engines = _rows(top["engines"], "engines")
        return cls(top["mode"], tuple(EngineSpec.from_json(row) for row in engines))


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


def plan_engines(
    manifest: Manifest, mode: EngineMode, layout: ProfileLayout = "pinned"
) -> EnginePlan:
    """The engines of an artifact in one mode.

    Args:
        manifest: of the artifact.
        mode: one engine for all timestep buckets, or one for each.
        layout: of the profiles, where one engine has several buckets.

    Raises:
        UsageError: an unknown mode or layout, or the artifact was exported without graphs for it.
    """
    if layout not in LAYOUT_REASONS:
        raise UsageError(
            f"profile layout {layout!r} is unknown; use one of {list(LAYOUT_REASONS)}"
        )
    if mode not in ENGINE_MODES:
        raise UsageError(f"engine mode {mode!r} is unknown; use one of {list(ENGINE_MODES)}")
    if mode == "per_bucket":
        graphs: dict[str, list[int]] = {}
        for bucket in manifest.buckets:
            graphs.setdefault(bucket["onnx"], []).append(bucket["index"])
        return EnginePlan(
            mode,
            tuple(
                EngineSpec(_stem(graph), graph, (_pinned(buckets, {}),))
                for graph, buckets in graphs.items()
            ),
        )
    if not manifest.profile_graphs:
        raise UsageError(
            "this artifact has no graphs for the engine mode 'profiles'. Export it again with "
            "export.profiles set to true, or build with the mode 'per_bucket'."
        )
    return EnginePlan(
        mode, tuple(_profiled(row, manifest, layout) for row in manifest.profile_graphs)
    )


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


def _profiled(row: Mapping[str, Any], manifest: Manifest, layout: ProfileLayout) -> EngineSpec:
    """The engine of one profiles graph: a profile per set of lengths, or one over all of them."""
    buckets_with: dict[tuple[int, ...], list[int]] = {}
    inputs: Mapping[str, str] = row["kept_inputs"]
    for bucket in row["buckets"]:
        kept = tuple(int(manifest.schedule[block][bucket]) for block in inputs.values())
        buckets_with.setdefault(kept, []).append(bucket)
    pinned = tuple(
        _pinned(buckets, {n: (k,) for n, k in zip(inputs, kept, strict=True)})
        for kept, buckets in buckets_with.items()
    )
    spanning = (ProfileSpec(tuple(entry for p in pinned for entry in p.lengths)),)
    return EngineSpec(
        _stem(row["onnx"]), row["onnx"], spanning if layout == "spanning" else pinned
    )


def _pinned(buckets: Sequence[int], shapes: Mapping[str, Shape]) -> ProfileSpec:
    return ProfileSpec((LengthsSpec(tuple(buckets), shapes),))


def _bounds(shapes: Sequence[Shape]) -> Bounds:
    """Per axis the smallest, the median and the largest size."""
    axes = [sorted(sizes) for sizes in zip(*shapes, strict=True)]
    low, middle, high = (
        tuple(sizes[at] for sizes in axes) for at in (0, len(shapes) // 2, -1)
    )
    return low, middle, high


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
    if not engine.profiles or not all(profile.lengths for profile in engine.profiles):
        return "it needs a profile, and each profile a timestep bucket"
    entries = [(n, e) for n, p in enumerate(engine.profiles) for e in p.lengths]
    first = entries[0][1]
    if len(entries) > 1 and not first.shapes:
        return f"a static graph has one profile and no lengths, this has {len(entries)}"
    for number, entry in entries:
        problem = _lengths_problem(entry, first)
        if problem:
            return f"profile {number}: {problem}"
    return None


def _lengths_problem(entry: LengthsSpec, first: LengthsSpec) -> str | None:
    if not entry.buckets:
        return "it needs a timestep bucket"
    if set(entry.shapes) != set(first.shapes):
        return f"it is for the inputs {sorted(entry.shapes)}, the first for {sorted(first.shapes)}"
    for name, shape in entry.shapes.items():
        if not shape or not all(type(size) is int and size > 0 for size in shape):
            return f"{name} has the shape {shape}, expected sizes above 0"
        if len(shape) != len(first.shapes[name]):
            return f"{name} has {len(shape)} axes, and {len(first.shapes[name])} in the first"
    return None


def _profile(rows: Any, engine: str) -> ProfileSpec:
    entries = _rows(rows, f"a profile of {engine!r}")
    return ProfileSpec(tuple(_lengths(row, engine) for row in entries))


def _lengths(row: Any, engine: str) -> LengthsSpec:
    row = _keys(row, ("buckets", "shapes"), f"lengths of {engine!r}")
    shapes, buckets = row["shapes"], _rows(row["buckets"], f"buckets of {engine!r}")
    if not isinstance(shapes, dict) or not all(type(bucket) is int for bucket in buckets):
        raise _damaged(
            f"lengths of {engine!r} must have numbers as buckets and shapes by input, found {row!r:.200}"
        )
    return LengthsSpec(
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
