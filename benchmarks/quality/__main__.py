"""Quality at equal MACs on the reference DiT, one table.

    python -m benchmarks.quality --processes 2      # everything, days on CPU cores; goes on where it was, or where
                                                    # the committed JSON was
    python -m benchmarks.quality --processes 14 --device cuda    # minutes on a large GPU
    python -m benchmarks.quality --only 'ours_42_*'  # some of them
    python -m benchmarks.quality --report           # the table from the runs that are there
    python -m benchmarks.quality --smoke            # minutes, checks that all of it runs

Needs the Debian package dataset-fashion-mnist (for what is trained on images) and matplotlib. All that is
trained has the same number of steps, batch size, optimizer and learning rates. A run's seed is that of its
training and of the noise that it is sampled from, which all variants share. The second task is inpainting. Writes
``benchmarks/results/quality.json`` and, from it, docs/quality.md with its pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.case import Case
from benchmarks.quality.job import Job
from benchmarks.quality.jobs import jobs
from benchmarks.quality.page import PAGE, page
from benchmarks.quality.pictures import curve, sheet
from benchmarks.quality.pool import run_all
from benchmarks.quality.settings import BY_DEFAULT, FULL, QUARTER, SMOKE, Scale, config
from benchmarks.quality.table import (
    BY_ERRORS,
    BY_GRADIENTS,
    ahead_of,
    knee,
    standing_for,
    summarise,
)
from benchmarks.reference import fashion_mnist
from diffcr_compile.config import make_config
from diffcr_compile.errors import DiffCRError
from diffcr_compile.reference.quality import METRIC, load_real_statistics
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parents[1] / "results/quality.json"
PICTURES = Path(__file__).parents[2] / "docs/pictures"
# Of the settings of a compilation, those that its pictures depend on.
SECTIONS = ("routing", "calibration", "budget")


def conditions(scale: Scale) -> dict[str, Any]:
    """All that the figures depend on. Where a run was made is said with the run."""
    same_anywhere = {k: v for k, v in dataclasses.asdict(scale).items() if k != "device"}
    return {
        **same_anywhere,
        "sampler": "Euler, no guidance, classes in turn",
        "real_against_real_floor": load_real_statistics().floor(scale.samples),
        "settings_of_ours": config("ours", 0, scale).model_dump(
            mode="json", include=set(SECTIONS)
        ),
    }


def made_alike(published: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two sets of conditions lead to the same figures.

    A setting that the published ones lack did not exist then, and counts as standing at its default.
    """
    name = "settings_of_ours"
    if {**published, name: None} != {**json.loads(json.dumps(now)), name: None}:
        return False
    try:
        earlier = make_config({s: published[name][s] for s in SECTIONS})
    except (DiffCRError, KeyError):  # of settings that no longer exist
        return False
    return earlier.model_dump(include=set(SECTIONS)) == make_config(now[name]).model_dump(
        include=set(SECTIONS)
    )


def write_report(scale: Scale, work: Path, target: Path, pictures: Path) -> None:
    """The table of all runs that are there."""
    every_job = [job for group in jobs(scale) for job in group]
    done = [job for job in every_job if (work / f"{job.name}.json").exists()]
    runs = [json.loads((work / f"{job.name}.json").read_text()) for job in done]
    every = summarise(runs)
    rows = [
        row for row in every if (row["task"], row["training"]) == ("generation", FULL)
    ]  # in the pictures: trained in full
    pictures.mkdir(parents=True, exist_ok=True)
    curve(rows, scale.few, pictures / "quality_against_macs.png")
    sheets = earlier_sheets(target)
    for budget in scale.budgets:
        # runs that were taken up from the committed JSON have no images; neither has their sheet to be drawn anew
        if (
            work / f"{Job('ours', budget, scale.seeds[0], scale.few).name}.safetensors"
        ).exists():
            name = f"quality_samples_{round(100 * budget)}.png"
            sheets[name] = sheet(budget, scale.seeds[0], scale.few, work, pictures / name)
    report = {
        "metric": METRIC,
        "conditions": conditions(scale),
        "missing": [dataclasses.asdict(job) for job in every_job if job not in done],
        "summary": every,
        "ours_against": against(BY_GRADIENTS, runs, scale),
        "measured_errors_against": against(BY_ERRORS, runs, scale),
        "knee": knee(rows, scale.budgets[0]),
        "sheets_top_to_bottom": sheets,
        "runs": runs,
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    if target == RESULTS:
        PAGE.write_text(page(report))
    for row in every:
        kid = row["kid_x1000"]
        print(
            f"{row['task']:10} {row['variant']:30} {row['budget']:4.0%} {row['steps_taken']:3} of {row['steps']:3} steps, "
            f"MACs {row['macs']['mean']:6.1%}: KID x 1000 {kid['mean']:6.1f} "
            f"({kid['min']:.1f} to {kid['max']:.1f}, {row['seeds']} seeds)"
        )


def against(
    variants: Sequence[str], runs: Sequence[dict[str, Any]], scale: Scale
) -> dict[str, Any]:
    """By training and budget: one way of ours against everything else, with few steps."""
    result: dict[str, Any] = {}
    for training in (FULL, QUARTER, BY_DEFAULT):
        for budget in scale.budgets:
            name = standing_for(variants, runs, budget, scale.few, training)
            if name:
                others = ahead_of(runs, budget, scale.few, name, training)
                found = result.setdefault(str(training), {})
                found[str(budget)] = {"ours": name, "others": others}
    return result


def earlier_sheets(target: Path) -> dict[str, list[str]]:
    """Sample sheets that are there, and their rows."""
    if not target.exists():
        return {}
    return dict(json.loads(target.read_text())["sheets_top_to_bottom"])


def chosen(groups: list[list[Job]], names: Sequence[str]) -> list[list[Job]]:
    """A group for every pattern, or the groups as they are."""
    if list(names) == ["*"]:
        return groups
    every = [job for group in groups for job in group]
    return [[job for job in every if fnmatch.fnmatch(job.name, name)] for name in names]


def take_up(published: Path, scale: Scale, work: Path) -> None:
    """Put the runs of an earlier report into the work folder, if it was made with the same settings."""
    if not published.exists():
        return
    report = json.loads(published.read_text())
    if not made_alike(report["conditions"], conditions(scale)):
        print(f"{published.name} was made with other settings: all runs are made anew")
        return
    for entry in report["runs"]:
        job = Job(*(entry[field.name] for field in dataclasses.fields(Job)))
        path = work / f"{job.name}.json"
        if not path.exists():
            path.write_text(json.dumps(entry, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default=Scale.device)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no run after"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=["*"],
        help="names of runs, such as 'ours_42_*'; in this order",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    scale, target, pictures = Scale(device=args.device), RESULTS, PICTURES
    if args.smoke:
        scale = dataclasses.replace(SMOKE, device=args.device)
        args.work = args.work / "smoke"
        target, pictures = args.work / "quality.json", args.work
    args.work.mkdir(parents=True, exist_ok=True)
    take_up(target, scale, args.work)
    groups = [
        [Case(job, scale.trained_for(job.training), args.work, args.data) for job in group]
        for group in chosen(jobs(scale), args.only)
    ]
    if not args.report:
        run_all(groups, args.processes, deadline)
    write_report(scale, args.work, target, pictures)


if __name__ == "__main__":
    main()
