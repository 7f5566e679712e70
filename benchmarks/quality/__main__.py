"""Quality at equal MACs on the reference DiT, one table.

    python -m benchmarks.quality --processes 2      # everything, days on CPU cores; goes on where it was, or where
                                                    # the committed JSON was
    python -m benchmarks.quality --processes 14 --device cuda    # minutes on a large GPU
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
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.case import Case
from benchmarks.quality.job import Job
from benchmarks.quality.jobs import jobs
from benchmarks.quality.page import PAGE, page
from benchmarks.quality.pictures import curve, sheet
from benchmarks.quality.pool import run_all
from benchmarks.quality.settings import SMOKE, Scale, config
from benchmarks.quality.table import ahead_of, knee, summarise
from benchmarks.reference import fashion_mnist
from diffcr_compile.reference.quality import METRIC, load_real_statistics
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parents[1] / "results/quality.json"
PICTURES = Path(__file__).parents[2] / "docs/pictures"


def conditions(scale: Scale) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        **dataclasses.asdict(scale),
        "sampler": "Euler, no guidance, classes in turn",
        "real_against_real_floor": load_real_statistics().floor(scale.samples),
        "settings_of_ours": config("ours", 0, scale).model_dump(mode="json"),
    }


def write_report(scale: Scale, work: Path, target: Path, pictures: Path) -> None:
    """The table of all runs that are there."""
    every_job = [job for group in jobs(scale) for job in group]
    done = [job for job in every_job if (work / f"{job.name}.json").exists()]
    runs = [json.loads((work / f"{job.name}.json").read_text()) for job in done]
    every = summarise(runs)
    rows = [row for row in every if row["task"] == "generation"]
    pictures.mkdir(parents=True, exist_ok=True)
    curve(rows, scale.few, pictures / "quality_against_macs.png")
    with_ours = [
        j.budget
        for j in done
        if (j.task, j.variant, j.seed, j.steps) == ("generation", "ours", 0, scale.few)
    ]
    sheets = {}
    for budget in with_ours:
        name = f"quality_samples_{round(100 * budget)}.png"
        sheets[name] = sheet(budget, scale.seeds[0], scale.few, work, pictures / name)
    report = {
        "metric": METRIC,
        "conditions": conditions(scale),
        "missing": [dataclasses.asdict(job) for job in every_job if job not in done],
        "summary": every,
        "ours_against": {str(b): ahead_of(rows, b, scale.few) for b in with_ours},
        "knee": knee(rows, scale.budgets[0]),
        "sheets_top_to_bottom": sheets,
        "runs": runs,
        "environment": {**environment(), "device": device_name(scale.device)},
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


def take_up(published: Path, scale: Scale, work: Path) -> None:
    """Put the runs of an earlier report into the work folder, if it was made with the same settings."""
    if not published.exists():
        return
    report = json.loads(published.read_text())
    if report["conditions"] != json.loads(json.dumps(conditions(scale))):
        print(f"{published.name} was made with other settings: all runs are made anew")
        return
    for entry in report["runs"]:
        job = Job(*(entry[field.name] for field in dataclasses.fields(Job)))
        path = work / f"{job.name}.json"
        # The dense model's images are needed for the PSNR of the others, and are not published.
        if job.variant != "dense" and not path.exists():
            path.write_text(json.dumps(entry, indent=1))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default=Scale.device)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no run after"
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
    groups = [[Case(j, scale, args.work, args.data) for j in group] for group in jobs(scale)]
    if not args.report:
        run_all(groups, args.processes, deadline)
    write_report(scale, args.work, target, pictures)


if __name__ == "__main__":
    main()
