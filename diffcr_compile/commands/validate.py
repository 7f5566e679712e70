"""``diffcr validate``: is an artifact whole, and does it compute what it did on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, Folder, refuse_idle
from diffcr_compile.commands.terminal import console, note, print_json, say
from diffcr_compile.errors import AccuracyError, UsageError

EXAMPLES = (
    "out/",
    "out/ --level engine --bisect",
    "out/ --write-polygraphy golden_json/",
    "out/ --results outputs.json --bucket 2",
)


def register(app: App) -> None:
    """Add the verb."""
    app.verb("validate", EXAMPLES)(validate)


def validate(
    out: Folder,
    level: Annotated[
        Literal["onnx", "engine"],
        typer.Option(
            help="graphs in ONNX Runtime, or this device's engines, which may run then"
        ),
    ] = "onnx",
    bisect: Annotated[
        bool,
        typer.Option("--bisect", help="where a bucket is off, name the first block that is"),
    ] = False,
    write_polygraphy: Annotated[
        Path | None,
        typer.Option(help="folder for golden inputs and outputs as Polygraphy's JSON"),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="outputs that polygraphy run --save-outputs wrote")
    ] = None,
    bucket: Annotated[
        int | None, typer.Option(help="with --results: which timestep bucket; 0 if left out")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file's hash and compare with the golden outputs of each bucket: ONNX Runtime, engines, Polygraphy."""
    from diffcr_compile import validate as checks

    _refuse_what_has_no_effect(
        {
            "--write-polygraphy": write_polygraphy is not None,
            "--results": results is not None,
            "--level engine": level == "engine",
            "--bisect": bisect,
            "--bucket": bucket is not None,
        }
    )
    if write_polygraphy is not None:
        from diffcr_compile.polygraphy_results import write_polygraphy as write

        paths = [str(path) for path in write(out, write_polygraphy)]
        if as_json:
            print_json(paths)
        else:
            say("\n".join(paths))
        return
    if results is not None:
        _results(out, results, bucket or 0, as_json)
        return
    if level == "engine":
        rows = checks.validate_engines(out, bisect)
    else:
        rows = checks.validate_artifact(out, bisect)
    if as_json:
        print_json(rows)
        return
    _print(rows)
    if level == "engine":
        say(
            f"{out}: every bucket gives its golden outputs on this device; the engines may be used"
        )
    else:
        say(f"{out}: every file matches the manifest, every bucket its golden outputs")


def _refuse_what_has_no_effect(given: Mapping[str, bool]) -> None:
    """Each of the first two does one thing, and takes no other option but --bucket."""
    used = [option for option, there in given.items() if there]
    alone = [option for option in ("--write-polygraphy", "--results") if option in used]
    if alone:
        goes_with = {alone[0]} | ({"--bucket"} if alone[0] == "--results" else set())
        idle = [option for option in used if option not in goes_with]
    else:
        idle = ["--bucket"] if "--bucket" in used else []
    refuse_idle(idle, f"with {alone[0]}" if alone else "without --results")


def _results(out: Path, results: Path, bucket: int, as_json: bool) -> None:
    from diffcr_compile.polygraphy_results import compare_results

    rows = compare_results(out, results, bucket)
    if not rows:
        raise UsageError(f"{results} holds no outputs", code="DCR-U006")
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            note(f"{row['runner']}, call {row['call']}:")
        _print(rows)
    wrong = [row["runner"] for row in rows if not row["passed"]]
    if wrong:
        raise AccuracyError(
            f"{', '.join(wrong)} in {results} does not give the golden outputs of bucket {bucket}",
            code="DCR-Q002",
        )


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
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
