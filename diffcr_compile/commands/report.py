"""``diffcr report``: draw the report anew."""

from __future__ import annotations

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, DryRun, Folder
from diffcr_compile.commands.outcome import read_report
from diffcr_compile.commands.terminal import print_json, say


def register(app: App) -> None:
    """Add the verb."""
    app.verb("report", ("out/",))(report)


def report(out: Folder, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Write report.html anew from report.json and say where it is."""
    from diffcr_compile.report import write_html

    found, page = read_report(out), out / "report/report.html"
    if not dry_run:
        write_html(found, out / "report")
    if as_json:
        print_json({"report": str(page), "verdict": found["verdict"], "written": not dry_run})
    else:
        say(f"would write {page}" if dry_run else str(page))
