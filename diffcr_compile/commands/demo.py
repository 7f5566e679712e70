"""``diffcr demo``: the whole job on the model that ships with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import Budget, Config, Out, Settings, settings
from diffcr_compile.commands.outcome import print_report
from diffcr_compile.commands.progress import progress


def register(app: App) -> None:
    """Add the verb."""
    app.verb("demo", ("-o out", "-o out --budget 50% --set calibration.steps=400"))(demo)


def demo(
    out: Out = Path("out"),
    budget: Budget = "60%",
    config: Config = None,
    set_: Settings = None,
    samples: Annotated[int, typer.Option(help="images for the quality metric")] = 400,
) -> None:
    """Compile the reference DiT that ships with the package: the whole job, on real input."""
    import diffcr_compile as dcr
    from diffcr_compile.reference import demo as reference

    chosen = settings(config, set_, reference.SETTINGS)
    inputs = reference.example_inputs()
    batch = chosen.export.batch or len(inputs["timestep"])
    started = time.monotonic()
    with progress() as event:
        artifact = dcr.compile(
            reference.load_reference_dit(),
            out,
            example_inputs=inputs,
            budget=budget,
            config=chosen,
            conditions=reference.draw_labels,
            evaluate=reference.quality_evaluation(samples, chosen.rollouts.steps, batch),
            name=reference.NAME,
            progress=event,
        )
    print_report(artifact.report, out, time.monotonic() - started)
