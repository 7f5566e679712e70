"""``diffcr suggest``: which budget to ask for, without training."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import (
    AsJson,
    Config,
    DryRun,
    Inputs,
    ModelName,
    PipelineFile,
    Settings,
    settings,
)
from diffcr_compile.commands.progress import progress
from diffcr_compile.commands.terminal import console, note, print_json, say, terminal

EXAMPLES = (
    "demo",
    "python:my_model:make --budgets 80%,60%,40% --json",
    "demo --set budget.metric=latency --set budget.table=table.json",
)
# Enough to see the shape of the curve; a calibration takes more.
DEFAULTS: dict[str, dict[str, Any]] = {"rollouts": {"trajectories": 32, "pipeline_runs": 4}}


def register(app: App) -> None:
    """Add the verb."""
    app.verb("suggest", EXAMPLES)(suggest)


def suggest(
    model: ModelName,
    budgets: Annotated[
        str, typer.Option(help="shares of the dense model's cost, with commas between")
    ] = "90%,80%,70%,60%,50%,40%,30%",
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Try several budgets without training: predicted and measured error against speed-up. Writes nothing."""
    import diffcr_compile as dcr
    from diffcr_compile.config import parse_budget
    from diffcr_compile.sources import load_case
    from diffcr_compile.suggestions import routed_for, work_of

    shares = [parse_budget(text) for text in budgets.split(",")]
    chosen = settings(config, set_, _defaults(model))
    case = load_case(
        model, inputs, pipeline_inputs, chosen.rollouts.steps, terminal.verbosity >= 0
    )
    if dry_run:
        program, runs = routed_for(case.model, case.inputs, chosen)
        _say_work(work_of(program, chosen, len(shares), runs is not None), as_json)
        return
    with progress() as event:
        found = dcr.suggest(
            case.model,
            case.inputs,
            budgets=shares,
            config=chosen,
            conditions=case.conditions,
            progress=event,
        )
    if as_json:
        print_json(found.to_json())
        return
    _show(found, model)


def _defaults(model: str) -> dict[str, dict[str, Any]]:
    if model != "demo":
        return DEFAULTS
    from diffcr_compile.reference.demo import SETTINGS

    return {**SETTINGS, **DEFAULTS}


def _say_work(work: Any, as_json: bool) -> None:
    import dataclasses

    if as_json:
        print_json(dataclasses.asdict(work))
        return
    say(
        f"would sample {work.trajectories} times in {work.steps} steps with the dense model, then run "
        f"{work.batches} batches of at most {work.batch} states for {work.blocks} blocks; writes nothing"
    )


def _show(found: Any, model: str) -> None:
    unit = {"macs": "MACs"}.get(found.metric, found.metric)
    table = Table(
        "budget", f"{unit} reached", "error predicted", "measured", "speed-up predicted", ""
    )
    for option in found.options:
        table.add_row(
            f"{option.schedule.asked:.0%}",
            f"{option.cost:.2%}",
            f"{option.predicted_error:.4f}",
            f"{option.measured_error:.4f}",
            f"{1 / option.cost:.2f} x",
            "knee" if option is found.knee else "",
        )
    console.print(table)
    for budget in found.unreachable:
        note(f"{budget:.0%} cannot be reached, the smallest budget is {found.smallest:.1%}")
    say(
        f"errors: share of the output's mean square, before any training, on {found.states} states that "
        f"the schedules were not solved on; speed-up: as the {unit} imply"
    )
    say(f"next: diffcr compile {model} --budget {found.knee.schedule.asked:.0%}")
