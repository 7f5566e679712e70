"""What the report shows beyond the figures that are stored: ratios, means, totals, curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from diffcr_compile.errors import ArtifactError
from diffcr_compile.report.charts import MOST_POINTS, Line, line_chart
from diffcr_compile.report.text import number, percent0

SCHEMA_VERSION = 1
REQUIRED = [
    "schema_version",
    "created",
    "title",
    "model",
    "verdict",
    "checks",
    "budget",
    "parity",
    "size",
    "schedule",
    "timestep_buckets",
    "num_tokens",
    "macs",
    "seconds",
    "peak_rss_bytes",
    "environment",
    "commands",
    "warnings",
]  # the others (speedup, quality, calibration, pictures) may be null or absent


@dataclass(frozen=True)
class KeepRow:
    """One block of the keep map: its tokens, and per timestep bucket K and K / N."""

    block: str
    tokens: int
    kept: list[int]

    @property
    def ratios(self) -> list[float]:
        """Keep ratio per timestep bucket, each in [0, 1]."""
        return [kept / self.tokens for kept in self.kept]


def check_report(report: Mapping[str, Any]) -> None:
    """Refuse what is no report of this schema version.

    Raises:
        ArtifactError: a required key is missing, or the schema version is another one.
    """
    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise ArtifactError(
            f"report.json: found no {', '.join(missing)}; expected all of "
            f"{', '.join(REQUIRED)}. Run the compilation again to write a complete report."
        )
    if report["schema_version"] != SCHEMA_VERSION:
        raise ArtifactError(
            f"report.json: found schema_version {report['schema_version']!r}, expected "
            f"{SCHEMA_VERSION}. Draw it with the release of diffcr-compile that wrote it."
        )


def bucket_names(report: Mapping[str, Any]) -> list[str]:
    """The timestep buckets in words, first to last: "0 – 250"."""
    return [f"{low:g} – {high:g}" for low, high in report["timestep_buckets"]]


def keep_rows(report: Mapping[str, Any]) -> list[KeepRow]:
    """The keep map, block after block in the order of the model.

    Raises:
        ArtifactError: a row does not have one entry per bucket, or K is not in [0, N].
    """
    buckets, rows = len(report["timestep_buckets"]), []
    for block, kept in report["schedule"].items():
        tokens = report["num_tokens"].get(block, 0)
        if len(kept) != buckets or tokens < 1 or not all(0 <= k <= tokens for k in kept):
            raise ArtifactError(
                f"report.json: schedule of block {block!r}: found kept tokens {kept} of "
                f"{tokens} tokens, expected {buckets} integers (one per timestep bucket), each "
                "from 0 to the block's num_tokens. Run the compilation again."
            )
        rows.append(KeepRow(block, tokens, list(kept)))
    return rows


def mean_ratios(rows: Sequence[KeepRow]) -> list[float]:
    """Mean keep ratio over the blocks, one per timestep bucket; [] without blocks."""
    return [fmean(column) for column in zip(*(row.ratios for row in rows), strict=True)]


def tokens_by_noise(report: Mapping[str, Any], ratios: Sequence[float]) -> str | None:
    """Whether noisier timestep buckets keep fewer tokens, in a sentence; None where that cannot be told.

    Args:
        report: says in which order sampling goes through the buckets, from noise to picture.
        ratios: mean keep ratio of each bucket, from :func:`mean_ratios`.
    """
    order = report.get("noisiest_first") or []
    if len(order) < 2 or not ratios:
        return None
    seen = [ratios[bucket] for bucket in order]
    found = ", ".join(map(percent0, seen))
    pairs = list(itertools.pairwise(seen))
    if all(math.isclose(a, b) for a, b in pairs):
        return "All timestep buckets keep equally many tokens."
    if all(a < b or math.isclose(a, b) for a, b in pairs):
        return (
            f"The noisier a bucket, the fewer tokens it keeps: from noise to picture {found}."
        )
    return (
        f"Noisier buckets do not always keep fewer tokens here: from noise to picture {found}."
    )


def macs_totals(report: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over the routed blocks: dense, and kept, routing and moved_bytes per bucket."""
    blocks = report["macs"]["per_block"].values()

    def per_bucket(key: str) -> list[int]:
        return [sum(column) for column in zip(*(b[key] for b in blocks), strict=True)]

    keys = ("kept", "routing", "moved_bytes")
    return {"dense": sum(b["dense"] for b in blocks)} | {k: per_bucket(k) for k in keys}


def timing_runs(speedup: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The interleaved runs: seconds per run, dense / compressed per run, and the medians."""
    conditions = (speedup or {}).get("conditions") or {}
    dense = conditions.get("dense_seconds") or []
    compressed = conditions.get("compressed_seconds") or []
    if not dense or len(dense) != len(compressed):
        return None
    return {
        "dense": dense,
        "compressed": compressed,
        "ratios": [d / c for d, c in zip(dense, compressed, strict=True)],
        "dense_median": median(dense),
        "compressed_median": median(compressed),
        "ratio": median(dense) / median(compressed),
    }


def drift(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The trajectory's drift as a chart over the steps, and its last value."""
    values = [float(value) for value in (found or {}).get("relative_l2") or []]
    if not values:
        return None
    steps = list(range(1, len(values) + 1))
    chart = line_chart("Drift over sampling steps", steps, [Line("distance", values)], number)
    return {"chart": chart, "last": values[-1]}


def without(settings: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    """The settings except ``keys``, which are shown elsewhere."""
    return {key: value for key, value in (settings or {}).items() if key not in keys}


def learned_from(calibration: Mapping[str, Any] | None) -> str | None:
    """The artifact whose routers, ratios and weights were taken over; None where there was a calibration."""
    settings = (calibration or {}).get("settings") or {}
    found: str | None = (settings.get("run") or {}).get("learned_from")
    return found


def curves(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The calibration curves as three inline SVG charts, and how much of them is drawn."""
    history = sorted((calibration or {}).get("history") or [], key=lambda row: row["step"])
    if not history:
        return None
    steps = [row["step"] for row in history]

    def values(key: str) -> list[float]:
        return [math.nan if row[key] is None else float(row[key]) for row in history]

    asked, reached = (
        Line("asked", values("budget"), "dashed"),
        Line("reached", values("reached")),
    )
    charts: list[tuple[str, list[Line], Markup]] = []
    for title, lines, write in (
        ("Loss", [Line("loss", values("loss"))], number),
        ("Budget, of dense", [reached, asked], percent0),
        ("Mean keep ratio", [Line("mean keep ratio", values("mean_keep_ratio"))], number),
    ):
        charts.append((title, lines, line_chart(f"{title} over steps", steps, lines, write)))
    drawn = min(len(steps), MOST_POINTS)
    return {"charts": charts, "first": history[0], "last": history[-1]} | {
        "recorded": len(steps),
        "drawn": drawn,
    }
