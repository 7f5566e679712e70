"""``diffcr validate``: is an artifact whole, and does it compute what it did on the host."""

from __future__ import annotations

from rich.table import Table

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, Folder
from diffcr_compile.commands.terminal import console, print_json, say


def register(app: App) -> None:
    """Add the verb."""
    app.verb("validate", ("out/", "out/ --json"))(validate)


def validate(out: Folder, as_json: AsJson = False) -> None:
    """Check every file's hash and compare ONNX Runtime with the golden outputs of each bucket. Writes nothing."""
    from diffcr_compile.validate import validate_artifact

    rows = validate_artifact(out)
    if as_json:
        print_json(rows)
        return
    table = Table("bucket", "max abs", "relative L2", "cosine", "NaN/Inf", "tolerance")
    for row in rows:
        table.add_row(
            str(row["bucket"]),
            f"{row['max_abs']:.1e}",
            f"{row['rel_l2']:.1e}",
            f"{row['cosine']:.9f}",
            str(row["non_finite"]),
            f"{row['tolerance']:.0e}",
        )
    console.print(table)
    say(f"{out}: every file matches the manifest, every bucket its golden outputs")
