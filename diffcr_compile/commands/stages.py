"""``diffcr calibrate``, ``freeze`` and ``export``: the stages of a compilation one by one."""

from __future__ import annotations

from pathlib import Path

from diffcr_compile.commands.app import App
from diffcr_compile.commands.job import job_of_folder, make_job, say_done
from diffcr_compile.commands.options import (
    Budget,
    Config,
    DryRun,
    Folder,
    Inputs,
    OptionalModel,
    Out,
    PipelineFile,
    Settings,
    Steps,
    with_steps,
)
from diffcr_compile.commands.schedule_table import print_schedule


def register(app: App) -> None:
    """Add the verbs."""
    app.verb(
        "calibrate", ("python:my_model:make -o out --budget 60%", "-c diffcr.yaml -o out")
    )(calibrate)
    app.verb("freeze", ("out/",))(freeze)
    app.verb("export", ("out/",))(export)


def calibrate(
    model: OptionalModel = None,
    out: Out = Path("out"),
    budget: Budget = None,
    steps: Steps = None,
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    dry_run: DryRun = False,
) -> None:
    """Learn routers and keep ratios under a budget. Interrupted, the same command goes on."""
    set_ = with_steps(set_, steps)
    job = make_job(model, out, config, set_, budget, inputs, pipeline_inputs)
    if dry_run:
        job.announce("capture, route, rollouts, calibrate", until="calibrate")
        return
    artifact, seconds = job.compile(until="calibrate")
    say_done(artifact, seconds, "calibrated", f"diffcr freeze {out}")


def freeze(out: Folder, dry_run: DryRun = False) -> None:
    """Turn what was learned into whole numbers of tokens, and show them. Goes on in a folder of calibrate."""
    import json

    job = job_of_folder(out)
    if dry_run:
        job.announce("capture, route, rollouts, calibrate, freeze", until="freeze")
        return
    artifact, seconds = job.compile(until="freeze")
    schedule = json.loads((out / "model/schedule.json").read_text())
    ranges = list(zip(schedule["edges"], schedule["edges"][1:], strict=False))
    print_schedule(schedule["kept_tokens"], schedule["num_tokens"], ranges)
    say_done(artifact, seconds, "frozen", f"diffcr export {out}")


def export(out: Folder, dry_run: DryRun = False) -> None:
    """Write ONNX graphs, weights, golden outputs and manifest. Goes on in a folder of calibrate or freeze."""
    job = job_of_folder(out)
    if dry_run:
        job.announce("capture, route, rollouts, calibrate, freeze, export", until="export")
        return
    artifact, seconds = job.compile(until="export")
    say_done(artifact, seconds, "exported", f"diffcr validate {out}")
