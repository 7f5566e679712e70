"""``diffcr diff``: two artifacts side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson
from diffcr_compile.commands.terminal import console, print_json, say

FIRST = Annotated[Path, typer.Argument(metavar="A", help="an artifact's folder")]
SECOND = Annotated[Path, typer.Argument(metavar="B", help="another one's")]


def register(app: App) -> None:
    """Add the verb."""
    app.verb("diff", ("out_60/ out_50/", "before/ after/ --json"))(diff)


def diff(a: FIRST, b: SECOND, as_json: AsJson = False) -> None:
    """What differs between two artifacts: model, settings, kept tokens, cost, speed, quality. Writes nothing."""
    from diffcr_compile.artifact_diff import compare_artifacts

    found = compare_artifacts(a, b)
    if as_json:
        print_json(found)
        return
    for title, rows in found.items():
        if rows:
            _table(title, rows)
    if not any(found.values()):
        say("no difference")


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("", "A", "B", "B - A", title=title, title_justify="left")
    for row in rows:
        change = row.get("change")
        shown = "" if change is None else f"{change:+.4g}"
        table.add_row(
            Text(str(row["what"])), Text(_plain(row["a"])), Text(_plain(row["b"])), shown
        )
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
