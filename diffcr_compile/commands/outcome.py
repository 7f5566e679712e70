"""What a finished compilation says on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from diffcr_compile.commands.terminal import console, note, say
from diffcr_compile.data_files import read_json
from diffcr_compile.errors import ArtifactError, UsageError

SHOWN_STAGES = ("rollouts", "calibrate", "export", "benchmark", "quality")


def print_report(report: Mapping[str, Any] | None, out: Path, seconds: float) -> None:
    """The checks, the quality and the time as a table, and where the report is."""
    if report is None:  # one of several ranks; rank 0 has the report and says it
        return
    table = Table("what", "found", "expected", "")
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["passed"] else "[red]missed[/]"
        table.add_row(check["name"], check["found"], check["expected"], mark)
    quality = report["quality"]
    if quality:
        table.add_row(
            quality["metric"],
            f"{quality['compressed']:.2f} compressed, {quality['dense']:.2f} dense",
            f"lower is better, {quality['num_samples']} samples",
            "",
        )
    console.print(table)
    for warning in report["warnings"]:
        note(f"warning: {warning}")
    spent = ", ".join(
        f"{s} {report['seconds'][s]:.0f} s" for s in SHOWN_STAGES if s in report["seconds"]
    )
    console.print(f"{seconds:.0f} s ({spent})")
    say(f"report: {out / 'report/report.html'}")


def read_report(out: Path) -> dict[str, Any]:
    """``report.json`` of an artifact.

    Raises:
        UsageError: there is none.
    """
    path = out / "report/report.json"
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; {out} was not finished by diffcr compile or demo", code="DCR-U018"
        )
    try:
        found: dict[str, Any] = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    except ValueError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Run the compilation again with the same -o.", code="DCR-A002"
        ) from error
    return found
