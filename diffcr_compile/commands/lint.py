"""``diffcr lint``: does a target take these graphs?"""

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
from diffcr_compile.errors import TargetError

if TYPE_CHECKING:
    from diffcr_compile.export.lint import Finding


def register(app: App) -> None:
    """Add the verb."""
    app.verb("lint", ("out/", "out/ --target jetson-agx-orin@jp6.2", "model.onnx --json"))(
        lint
    )


def lint(
    out: Annotated[Path, typer.Argument(help="an artifact's folder, or one ONNX file")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="name, path of a YAML file, or all (the default); may be given several times"
        ),
    ] = None,
    targets: Annotated[
        Path | None, typer.Option(help="folder or YAML file with targets of your own")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check graphs against what a device takes: operators, types, TopK, opset. Exit code 3 if it does not."""
    from diffcr_compile.export.lint import lint as lint_path
    from diffcr_compile.planning.targets import all_targets, find_target

    every = not target or "all" in target
    chosen = all_targets(targets) if every else [find_target(t, targets) for t in target or ()]
    findings = lint_path(out, chosen)
    errors = [finding for finding in findings if finding.severity == "error"]
    if as_json:
        rows = [finding.to_json() for finding in findings]
        print_json({"targets": [t.name for t in chosen], "findings": rows})
    else:
        _print(findings, [t.name for t in chosen])
    if errors:
        names = ", ".join(dict.fromkeys(finding.target for finding in errors))
        rules = ", ".join(dict.fromkeys(finding.rule for finding in errors))
        raise TargetError(f"{out} does not suit {names}: {rules}. See the reasons above.")


def _print(findings: Sequence[Finding], targets: Sequence[str]) -> None:
    """One table per target, over all files together."""
    from diffcr_compile.export.lint import over_files

    for name in targets:
        mine = [finding for finding in findings if finding.target == name]
        refused = any(finding.severity == "error" for finding in mine)
        console.print(f"{name}: {'refused' if refused else 'ok'}", highlight=False)
        if not mine:
            continue
        table = Table("Operator", "Count", "Reason", "Block")
        for row in over_files(mine):
            reason = row.reason if row.severity == "error" else f"warning: {row.reason}"
            cells = (row.operator, str(row.count), reason, row.where)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
