"""Pass, fail or inconclusive: what the checks say, and whether the timing was steady enough to tell."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.config import CompileConfig

# Pairs of runs that spread wider than this share of their median do not settle a narrow question.
STEADY_SPREAD = 0.10
SPEED_CHECK = "speed-up of the sampling loop"


def stability(speed: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the pairs of interleaved runs spread; None where single pairs were not kept."""
    pairs: Sequence[float] = (speed.get("conditions") or {}).get("pair_ratios") or []
    if len(pairs) < 2:
        return None
    spread = (max(pairs) - min(pairs)) / statistics.median(pairs)
    return {"spread": spread, "allowed": STEADY_SPREAD, "steady": spread <= STEADY_SPREAD}


def decide(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The checks, each with ``decided``, and the verdict.

    The speed-up is undecided where the timing was not steady and the wanted value lies between the slowest
    and the fastest pair: another run on the same machine might say the opposite.
    """
    checks = [dict(check, decided=True) for check in report["checks"]]
    for check in checks:
        if check["name"] == SPEED_CHECK:
            check["decided"] = not _undecided(report)
    if all(check["passed"] and check["decided"] for check in checks):
        return checks, "pass"
    if all(check["passed"] or not check["decided"] for check in checks):
        return checks, "inconclusive"
    return checks, "fail"


def _undecided(report: Mapping[str, Any]) -> bool:
    speed = report["speedup"]
    found = speed.get("stability")
    if not found or found["steady"]:
        return False
    pairs = speed["conditions"]["pair_ratios"]
    return bool(min(pairs) < 1 / report["budget"]["asked"] <= max(pairs))


def commands(config: CompileConfig, folder: Path) -> list[str]:
    """The commands that repeat a run, check it and time it; none where it was made in Python."""
    if config.run.model is None:
        return []
    out = shlex.quote(folder.name)
    return [
        f"diffcr compile -c {out}/effective_config.yaml -o {out}_again",
        f"diffcr validate {out}",
        f"diffcr bench {out}",
        f"diffcr diff {out} {out}_again",
    ]
