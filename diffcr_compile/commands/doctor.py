"""``diffcr doctor``: what is installed, and what will not work."""

from __future__ import annotations

from rich.table import Table

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson
from diffcr_compile.commands.terminal import console, print_json


def register(app: App) -> None:
    """Add the verb."""
    app.verb("doctor", ("", "--json"))(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Say which packages are here and what will not work without the missing ones."""
    from diffcr_compile.doctor import examine

    rows = examine()
    if as_json:
        print_json(rows)
        return
    table = Table("package", "version", "needed for")
    for row in rows:
        table.add_row(row["name"], row["version"] or "[red]missing[/]", row["needed_for"])
    console.print(table)
