"""Arguments and options that several verbs have, each declared once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffcr_compile.data_files import parse_yaml
from diffcr_compile.errors import UsageError

Out = Annotated[Path, typer.Option("--out", "-o", help="the artifact's folder")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="share of the dense model's cost, such as 60%, which is the default: MACs, or latency with budget.metric"
    ),
]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="one setting, such as calibration.steps=200")
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="training steps (calibration.steps); 0: no training", show_default=False
    ),
]
Folder = Annotated[Path, typer.Argument(help="an artifact's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done and written; write nothing")
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="demo, python:<module>:<factory>, or diffusers:<folder>\\[#component], a pipeline or a model"
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="demo, python:<module>:<factory>, or diffusers:<folder>\\[#component]; may be left out where the "
        "settings have run.model",
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        help="safetensors with example inputs, one tensor per argument; of a pipeline: of its call"
    ),
]
PipelineFile = Annotated[
    Path | None,
    typer.Option(
        "--pipeline-inputs",
        help="YAML or JSON with the arguments of a pipeline's call, or a list of such",
    ),
]
LearnedFrom = Annotated[
    Path | None,
    typer.Option(
        help="an artifact of the same model at another resolution or batch size: what it has learned is taken "
        "instead of a calibration"
    ),
]


def refuse_idle(options: Sequence[str], where: str) -> None:
    """Options that were given and would have no effect `where` they stand are not swallowed.

    Raises:
        UsageError: there are some.
    """
    if options:
        raise UsageError(f"{', '.join(options)} has no effect {where}; leave it out")


def with_steps(assignments: list[str] | None, steps: int | None) -> list[str] | None:
    """``--steps`` as one more ``--set``.

    Raises:
        UsageError: it is given both ways.
    """
    if steps is None:
        return assignments
    given = assignments or []
    if any(text.partition("=")[0] == "calibration.steps" for text in given):
        raise UsageError(
            f"the training steps are given twice, as --steps {steps} and by --set calibration.steps; leave one out",
            code="DCR-U010",
        )
    return [*given, f"calibration.steps={steps}"]


def settings(
    config: Path | None,
    assignments: list[str] | None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The settings of a compilation from ``--config`` and ``--set``."""
    from diffcr_compile.config_file import load_config

    overrides: dict[str, Any] = {}
    for text in assignments or []:
        key, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--set takes key=value, got {text!r}", code="DCR-U013")
        try:
            overrides[key] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(
                f"--set {key}: the value is not YAML: {error}", code="DCR-U010"
            ) from error
    return load_config(config, overrides, defaults)
