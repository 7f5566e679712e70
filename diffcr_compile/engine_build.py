"""Engines for a target: where and in which mode they are built, and when they may be used.

On the device itself TensorRT builds them, and every timestep bucket is compared with its golden outputs
before one may run. On a machine without a GPU TensorRT-RTX builds them ahead of time for a named compute
capability: that shows that the graphs build and what they weigh, and its engines are never used unchecked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffcr_compile.engine_plan import (
    LAYOUT_REASONS,
    EngineMode,
    EnginePlan,
    ProfileLayout,
    choose_mode,
    plan_engines,
)
from diffcr_compile.errors import EnvironmentMissingError, UsageError
from diffcr_compile.export.device.builder import Built, build_engines
from diffcr_compile.export.device.check import check_engines, tolerance_of
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.memory import (
    BUILD_FACTOR,
    MemoryNeed,
    memory_need,
    read_activations,
    verdicts,
)
from diffcr_compile.export.device.script import write_script
from diffcr_compile.export.device.trtexec import trtexec_lines
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.planning.targets import Target
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.runtime.device import Device, tensorrt_module, version_of
from diffcr_compile.runtime.open_engines import open_device

# TensorRT-RTX knows neither Orin's SM87 nor Thor's SM110; these are the nearest that it knows.
NEAREST = {87: "SM86", 110: "SM120"}


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What a build would do.

    Attributes:
        target: the device that engines are for.
        mode: chosen.
        reason: why this one.
        layout: of the profiles, if it is ``profiles``.
        plan: the engines.
        lines: the same build with trtexec.
        memory: estimate of what the engines need.
        warnings: what will fail for memory on the target.
    """

    target: Target
    mode: EngineMode
    reason: str
    layout: ProfileLayout
    plan: EnginePlan
    lines: Sequence[str]
    memory: MemoryNeed
    warnings: Sequence[str]


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        planned: what it was to do.
        built: the engines.
        rows: figures of the comparison with the golden outputs, per timestep bucket; none where there
            is no device to run on, and then the engines are unverified.
    """

    planned: BuildPlan
    built: Built
    rows: Sequence[Mapping[str, Any]]

    @property
    def verified(self) -> bool:
        """Whether the runtime will use the engines."""
        return bool(self.rows)


def plan_build(
    artifact: Path,
    target: Target,
    mode: Literal["auto", "profiles", "per_bucket"] = "auto",
    settings: BuildSettings | None = None,
    layout: Literal["auto"] | ProfileLayout = "auto",
) -> BuildPlan:
    """Which engines a target gets; reads the manifest only.

    Args:
        artifact: the artifact's folder.
        target: the device.
        mode: ``auto`` chooses by target.
        settings: of the build.
        layout: of the profiles of the mode ``profiles``; ``auto`` takes the target's.

    Raises:
        UsageError: nothing is built for the target, or the artifact has no graphs for the mode.
    """
    manifest = read_manifest(artifact)
    choice = choose_mode(manifest, target)  # also says that a target has no engines
    chosen, reason = (choice.mode, choice.reason) if mode == "auto" else (mode, "asked for")
    laid_out = target.profile_layout if layout == "auto" else layout
    plan = plan_engines(manifest, chosen, laid_out)
    if chosen == "profiles":
        reason = f"{reason}; {LAYOUT_REASONS[laid_out]}"
    lines = trtexec_lines(plan, settings or BuildSettings())
    need = target_memory(artifact, manifest, plan, target)
    warnings = verdicts(need, target.memory_bytes)
    return BuildPlan(target, chosen, reason, laid_out, plan, lines, need, warnings)


def target_memory(
    artifact: Path, manifest: Manifest, plan: EnginePlan, target: Target
) -> MemoryNeed:
    """Estimate of the memory that engines need on a target."""
    fused = manifest.precision["type"] != "fp32" and bool(target.fused_attention)
    activations = read_activations(artifact, fused)
    return memory_need(manifest, plan, activations, target.build_memory or BUILD_FACTOR)


def build(
    artifact: Path,
    target: Target,
    mode: Literal["auto", "profiles", "per_bucket"] = "auto",
    settings: BuildSettings | None = None,
    progress: PhaseProgress | None = None,
    layout: Literal["auto"] | ProfileLayout = "auto",
) -> BuildResult:
    """Build the engines of an artifact and, on the device, compare them with the golden outputs.

    Args:
        artifact: the artifact's folder.
        target: the device.
        mode: ``auto`` chooses by target.
        settings: with a compute capability the build is ahead of time, whatever machine this is.
        progress: called with (engine and phase, steps done, steps).
        layout: of the profiles of the mode ``profiles``; ``auto`` takes the target's.

    Raises:
        UsageError: this machine's GPU is not the target's, or see :func:`plan_build`.
        EnvironmentMissingError: neither TensorRT with a GPU nor TensorRT-RTX is here.
        ResourceError, UnsupportedModelError, ArtifactError: see
            :func:`diffcr_compile.export.device.builder.build_engines`.
        AccuracyError: an engine does not give the golden outputs; it stays unusable.
    """
    settings = settings or BuildSettings()
    planned = plan_build(artifact, target, mode, settings, layout)
    manifest = read_manifest(artifact)
    write_script(artifact, manifest, planned.mode, settings, planned.layout)
    device, settings = _where(artifact, target, settings)
    built = build_engines(artifact, manifest, planned.plan, device, settings, progress)
    if built.sidecar.ahead_of_time:
        return BuildResult(planned, built, ())
    rows = check_engines(
        artifact, manifest, built.folder, device.runtime, tolerance_of(manifest)
    )
    return BuildResult(planned, built, rows)


def _where(
    artifact: Path, target: Target, settings: BuildSettings
) -> tuple[Device, BuildSettings]:
    """The device to build for, and the settings with the compute capability if it is not here."""
    missing = ""
    if settings.compute_capability is None and target.engine == "tensorrt":
        try:
            return _this(target), settings
        except EnvironmentMissingError as error:
            missing = f"{error.message} "
    try:
        trt = tensorrt_module("tensorrt-rtx")
    except EnvironmentMissingError as error:
        raise EnvironmentMissingError(
            f"nothing here can build engines: {missing}{error.message} On the device itself trtexec alone "
            f"does: copy {artifact} there and run sh build_on_device.sh, which was just written.",
            code="DCR-E002",
        ) from error
    capability = settings.compute_capability or _capability(target)
    number = capability.removeprefix("SM")
    if not number.isdigit():
        raise UsageError(f"a compute capability is written as SM86, got {capability!r}")
    device = Device("none", int(number), "tensorrt-rtx", version_of(trt))
    return device, dataclasses.replace(settings, compute_capability=capability)


def _this(target: Target) -> Device:
    """This device, if it is the target.

    Raises:
        EnvironmentMissingError: there is none.
        UsageError: it is another one.
    """
    here = open_device("tensorrt")[2]
    if target.sm and here.sm not in target.sm:
        wanted = ", ".join(f"SM{sm}" for sm in target.sm)
        raise UsageError(
            f"this is {here}, the target {target.name} is {wanted}: an engine must be built on the "
            "device that runs it. Run this on the device, name the target of this machine, or build "
            "ahead of time with --compute-capability."
        )
    return here


def _capability(target: Target) -> str:
    if len(target.sm) != 1:
        known = ", ".join(f"SM{sm}" for sm in target.sm) or "none"
        raise UsageError(
            f"{target.name} stands for several compute capabilities ({known}); name one with "
            "--compute-capability, such as SM86"
        )
    return NEAREST.get(target.sm[0], f"SM{target.sm[0]}")
