"""``diffcr build``: engines for a target, and the same build with trtexec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, DryRun, Folder
from diffcr_compile.commands.progress import progress
from diffcr_compile.commands.terminal import console, note, print_json, say

if TYPE_CHECKING:
    from diffcr_compile.engine_build import BuildPlan, BuildResult

EXAMPLES = (
    "out/ --target jetson-agx-orin@jp6.2",
    "out/ --target jetson-orin-nano@jp6.2 --mode per_bucket --workspace 512",
    "out/ --target rtx --compute-capability SM86",
)
Mode = Literal["auto", "profiles", "per_bucket"]
Layout = Literal["auto", "pinned", "spanning"]


def register(app: App) -> None:
    """Add the verb."""
    app.verb("build", EXAMPLES)(build)


def build(
    out: Folder,
    target: Annotated[str, typer.Option(help="name of the device, or path of a YAML file")],
    mode: Annotated[
        Mode,
        typer.Option(help="one engine with a profile per bucket, or an engine per bucket"),
    ] = "auto",
    layout: Annotated[
        Layout,
        typer.Option(
            help="of the mode profiles: a profile pinned to each bucket, or one that spans all"
        ),
    ] = "auto",
    workspace: Annotated[
        int | None, typer.Option(min=1, help="most scratch memory of a tactic, in MB")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="build ahead of time for this one, such as SM86")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Build engines with TensorRT; on the device itself, compare them with the golden outputs.

    Elsewhere TensorRT-RTX builds them ahead of time and unverified. The trtexec lines are always printed and
    stand in build_on_device.sh. Killed or interrupted, the same command goes on where it was.
    """
    from diffcr_compile import engine_build
    from diffcr_compile.export.device.job import BuildSettings
    from diffcr_compile.planning.targets import find_target

    settings = BuildSettings(workspace, compute_capability)
    device = find_target(target)
    planned = engine_build.plan_build(out, device, mode, settings, layout)
    if not as_json:
        _say_plan(planned)
    if dry_run:
        if as_json:
            print_json(_json(planned, None))
        return
    with progress() as event:
        result = engine_build.build(
            out,
            device,
            mode,
            settings,
            lambda what, done, steps: event(what, done, max(steps, 1), {}),
            layout,
        )
    if as_json:
        print_json(_json(planned, result))
        return
    _say_result(result)


def _say_plan(planned: BuildPlan) -> None:
    layout = f", {planned.layout}" if planned.mode == "profiles" else ""
    say(f"mode {planned.mode}{layout}: {planned.reason}")
    say("the same with trtexec, in the artifact's folder (build_on_device.sh):")
    for line in planned.lines:
        say(f"  {line}")
    need = planned.memory
    say(
        f"memory (estimate): {need.loaded / 1e6:.0f} MB with all engines loaded, {need.swapped / 1e6:.0f} MB "
        f"with swap=True, {need.build / 1e6:.0f} MB at the peak of the build"
    )
    for warning in planned.warnings:
        note(f"warning: {warning}")


def _say_result(result: BuildResult) -> None:
    if result.built.kept:
        note(f"built before and kept: {', '.join(result.built.kept)}")
    files = result.built.sidecar.files
    for name, file in files.items():
        say(f"{result.built.folder / name}.plan: {file.bytes / 1e6:.1f} MB")
    if not result.verified:
        device = result.built.sidecar.device
        say(
            f"unverified: built ahead of time for SM{device.sm} with {device.runtime} {device.version}. "
            "The graphs build; the runtime refuses these engines. Build on the device to use them."
        )
        return
    print_rows(result.rows)
    say("every timestep bucket gives its golden outputs; the engines may be used")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """The comparison with the golden outputs as a table."""
    table = Table("bucket", "relative L2", "max abs", "cosine", "NaN/Inf", "allowed L2")
    for row in rows:
        figures = (f"{row[key]:.1e}" for key in ("rel_l2", "max_abs"))
        cells = (f"{row['cosine']:.9f}", str(row["non_finite"]), f"{row['tolerance']:.0e}")
        table.add_row(str(row["bucket"]), *figures, *cells)
    console.print(table)


def _json(planned: BuildPlan, result: BuildResult | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "target": planned.target.name,
        "mode": planned.mode,
        "reason": planned.reason,
        "layout": planned.layout if planned.mode == "profiles" else None,
        "plan": planned.plan.to_json(),
        "trtexec": list(planned.lines),
        "memory": planned.memory.to_json(),
        "warnings": list(planned.warnings),
    }
    if result is not None:
        found |= {
            "folder": str(result.built.folder),
            "device": str(result.built.sidecar.device),
            "bytes": {n: f.bytes for n, f in result.built.sidecar.files.items()},
            "kept": list(result.built.kept),
            "verified": result.verified,
            "buckets": list(result.rows),
        }
    return found
