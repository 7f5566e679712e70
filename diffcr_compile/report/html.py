"""``report.html``: one file without script, link or font, which opens from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from diffcr_compile.errors import ArtifactError
from diffcr_compile.report import text, view
from diffcr_compile.report.pictures import replace_file

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_html(report: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/report.html`` from a report of schema version 1.

    Every string of the report is hostile text and is escaped. The pictures that
    ``report["pictures"]`` names are read from ``folder`` and embedded. An older page is
    replaced in one step, so that a reader sees the old one or the new one.

    Raises:
        ArtifactError: the report lacks a key, contradicts itself, or a picture is missing.
    """
    view.check_report(report)
    try:
        page = _template().render(_context(report, folder))
    except (jinja2.UndefinedError, KeyError) as error:
        raise ArtifactError(
            f"report.json: found no key {error} where the page needs one; expected the keys of "
            f"schema version {view.SCHEMA_VERSION}. Run the compilation again."
        ) from error
    return replace_file(folder / "report.html", page.encode())


def _template() -> jinja2.Template:
    source = files("diffcr_compile.report").joinpath("template.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    names = [
        "si",
        "size",
        "percent",
        "percent0",
        "points",
        "times",
        "seconds",
        "number",
        "cosine",
        "anything",
    ]
    environment.filters.update({name: getattr(text, name) for name in names})
    return environment.from_string(source)


def _context(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    rows = view.keep_rows(report)
    mean_ratios = view.mean_ratios(rows)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    undecided = [c["name"] for c in report["checks"] if not c.get("decided", True)]
    # A report that says "pass" over a failed check is shown as what it is.
    passed = report["verdict"] == "pass" and not failed
    is_open = (
        report["verdict"] == "inconclusive" and undecided and set(failed) <= set(undecided)
    )
    speedup, calibration = report.get("speedup"), report.get("calibration")
    return {
        "r": report,
        "failed": failed,
        "passed": passed,
        "state": "pass" if passed else "inconclusive" if is_open else "fail",
        "undecided": undecided,
        "stability": (speedup or {}).get("stability"),
        "drift": view.drift(report.get("drift")),
        "importance": _picture(report, folder, "importance"),
        "buckets": view.bucket_names(report),
        "rows": rows,
        "mean_ratios": mean_ratios,
        "by_noise": view.tokens_by_noise(report, mean_ratios),
        "totals": view.macs_totals(report),
        "speedup": speedup,
        "runs": view.timing_runs(speedup),
        "timing_conditions": view.without(
            (speedup or {}).get("conditions"), "dense_seconds", "compressed_seconds"
        ),
        "quality": report.get("quality"),
        "pictures": _pictures(report, folder),
        "calibration": calibration,
        "curves": view.curves(calibration),
        "learned_from": view.learned_from(calibration),
        "stages": list(dict.fromkeys([*report["seconds"], *report["peak_rss_bytes"]])),
    }


def _pictures(report: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Caption and data URI of the two sample sheets; empty where none were drawn."""
    named = report.get("pictures") or {}
    captions = {"samples_dense": "Dense", "samples_compressed": "Compressed"}
    return [
        (caption, _data_uri(folder, str(named[key])))
        for key, caption in captions.items()
        if named.get(key)
    ]


def _picture(report: Mapping[str, Any], folder: Path, key: str) -> str | None:
    """Data URI of one picture; None where it was not drawn."""
    name = (report.get("pictures") or {}).get(key)
    return _data_uri(folder, str(name)) if name else None


def _data_uri(folder: Path, name: str) -> str:
    path = folder / name
    # The name comes from the report: it must not carry another file into the page.
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise ArtifactError(
            f"report.json: picture {name!r}: found no such file in {folder}, expected a PNG "
            "beside report.json. Restore it, or set pictures to null."
        )
    data = path.read_bytes()
    if not data.startswith(PNG_SIGNATURE):
        raise ArtifactError(
            f"picture {path}: found {data[:8]!r} at its start, expected the signature of a PNG. "
            "Write it again with write_sample_sheet, or set pictures to null."
        )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
