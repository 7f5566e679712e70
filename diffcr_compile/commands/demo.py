"""``diffcr demo``: the whole job on the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.job import make_job
from diffcr_compile.commands.options import (
    Budget,
    Config,
    DryRun,
    Out,
    Settings,
    Steps,
    with_steps,
)
from diffcr_compile.commands.outcome import print_report

STAGES = (
    "capture, route, rollouts, calibrate, freeze, export, baseline, benchmark, quality, report"
)
SAMPLES = 400


def register(app: App) -> None:
    """Add the verb."""
    app.verb("demo", ("-o out", "-o out --budget 50% --steps 400"))(demo)


def demo(
    out: Out = Path("out"),
    budget: Budget = None,
    steps: Steps = None,
    config: Config = None,
    set_: Settings = None,
    samples: Annotated[
        int, typer.Option(min=2, help="images for the quality metric")
    ] = SAMPLES,
    dry_run: DryRun = False,
) -> None:
    """Compile the reference DiT that ships with the package: the whole job, on real input."""
    run_demo(out, budget, config, with_steps(set_, steps), samples, dry_run)


def run_demo(
    out: Path,
    budget: str | None,
    config: Path | None,
    set_: list[str] | None,
    samples: int = SAMPLES,
    dry_run: bool = False,
    inputs: Path | None = None,
    pipeline_inputs: Path | None = None,
) -> None:
    """What ``diffcr demo`` and ``diffcr compile demo`` do."""
    from diffcr_compile.sources import load_diffusers

    load_diffusers()  # the reference model is of a class of diffusers
    from diffcr_compile.reference import demo as reference

    job = make_job(
        "demo",
        out,
        config,
        set_,
        budget,
        inputs,
        pipeline_inputs,
        defaults=reference.SETTINGS,
    )
    if dry_run:
        job.announce(STAGES)
        return
    batch = job.config.export.batch or len(reference.example_inputs()["timestep"])
    evaluate = reference.QualityEvaluation(samples, job.config.rollouts.steps, batch)
    artifact, seconds = job.compile(evaluate=evaluate)
    print_report(artifact.report, out, seconds)
