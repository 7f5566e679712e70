"""``diffcr doctor``: what is installed, and what will not work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson
from diffcr_compile.commands.terminal import console, print_json
from diffcr_compile.errors import UsageError

if TYPE_CHECKING:
    from diffcr_compile.device_doctor import Finding

_COLORS = {"ok": "green", "warning": "yellow", "fails": "red"}


def register(app: App) -> None:
    """Add the verb."""
    app.verb("doctor", ("", "--json", "--device out/"))(doctor)


def doctor(
    out: Annotated[
        Path | None,
        typer.Argument(help="with --device: an artifact, for its memory and engines"),
    ] = None,
    device: Annotated[
        bool, typer.Option("--device", help="look at the board: L4T, TensorRT, power, memory")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is here and which command will not work, and why. With --device: about this board."""
    if device:
        from diffcr_compile.device_doctor import examine_device

        findings = examine_device(out)
        if as_json:
            print_json([vars(finding) for finding in findings])
        else:
            _print_device(findings)
        return
    if out is not None:
        raise UsageError("doctor looks at an artifact with --device only")
    _packages(as_json)


def _packages(as_json: bool) -> None:
    from diffcr_compile.doctor import examine

    rows = examine()
    if as_json:
        print_json(rows)
        return
    table = Table("package", "version", "needed for")
    for row in rows:
        table.add_row(row["name"], row["version"] or "[red]missing[/]", row["needed_for"])
    console.print(table)


def _print_device(findings: Sequence[Finding]) -> None:
    table = Table("", "what", "found", "which command fails or suffers", "what to do")
    for finding in findings:
        level = Text(finding.level, style=_COLORS[finding.level])
        cells = (finding.name, finding.found, finding.consequence, finding.remedy)
        table.add_row(level, *(Text(cell) for cell in cells))
    console.print(table)
