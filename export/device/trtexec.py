"""The same build in NVIDIA's own tool: lines that need neither this package nor Python."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from diffcr_compile.engine_plan import EnginePlan, EngineSpec, Shape
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.runtime.engine_files import plan_file

# Where trtexec writes; ``check`` moves what passes to the folder of the device.
UNCHECKED = "engines/unchecked"
# Beside the engines there: where they were built, which artifact the script was written for and, last of all, the
# mode that is whole.
BOARD_FILE = "board"
MADE_FROM_FILE = "made_from"
MODE_FILE = "mode"


def trtexec_arguments(spec: EngineSpec, settings: BuildSettings, plan: str) -> list[str]:
    """Arguments of trtexec that build one engine, but for --stronglyTyped, which TensorRT 11 lacks.

    Args:
        spec: the engine.
        settings: how.
        plan: where it goes, relative to the artifact.
    """
    arguments = [
        f"--onnx={spec.onnx}",
        f"--saveEngine={plan}",
        f"--timingCacheFile={UNCHECKED}/timing.cache",
        "--noTF32",
        "--skipInference",
        "--profilingVerbosity=detailed",
    ]
    if settings.workspace_mb is not None:
        arguments.append(f"--memPoolSize=workspace:{settings.workspace_mb}")
    for number, bounds in enumerate(spec.bounds()):
        if not bounds:
            continue
        arguments.append(f"--profile={number}")
        arguments += [
            f"--{bound}Shapes={_written({name: three[at] for name, three in bounds.items()})}"
            for at, bound in enumerate(("min", "opt", "max"))
        ]
    return arguments


def _written(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def trtexec_lines(plan: EnginePlan, settings: BuildSettings) -> list[str]:
    """One line per engine, to be run in the artifact's folder."""
    return [
        shlex.join(
            [
                "trtexec",
                *trtexec_arguments(spec, settings, unchecked_plan(spec)),
                "--stronglyTyped",
            ]
        )
        for spec in plan.engines
    ]


def unchecked_plan(spec: EngineSpec) -> str:
    """Where trtexec writes an engine, relative to the artifact."""
    return f"{UNCHECKED}/{plan_file(spec.name)}"
