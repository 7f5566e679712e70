"""docs/quality.md, from the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.settings import (
    DISTILLED,
    EARLY,
    EARLY_FLOOR,
    ERRORS_SHORTCUTS,
    FLOOR,
    FULL,
    SHORTCUTS,
    TRAINING_FREE_SHORTCUTS,
    TWO_BINS,
    Scale,
)
from benchmarks.quality.table import OUR_VARIANTS, compared
from benchmarks.reference.inpainting import LARGEST, SMALLEST

Report = Mapping[str, Any]
PAGE = Path(__file__).parents[2] / "docs/quality.md"
WAYS = ("ours_against", "measured_errors_against")  # the columns that compare
SMALL = 10  # from here down figures have two digits
INPAINTING = (
    f"One rectangle of each held-out image is painted anew, {SMALLEST} to {LARGEST} of 32 pixels high and wide, and what is "
    "known is put back before scoring, so that all figures are smaller than above."
)
NOTES = {
    "ours": "learned routers and keep ratios (gradients), this project's calibration",
    "ratios from measured errors": "ours with `calibration.ratios: errors`, solved again once",
    "uniform (Mixture-of-Depths)": "one keep ratio for all blocks and timesteps, learned routers",
    "blocks dropped": "whole blocks left out, chosen per timestep bucket over measured errors, distilled",
    "paper's recipe": "sigmoid gate, two bins, clamped ratios, mean-ratio loss, flow matching on images",
    "random router": "ours with tokens chosen at random",
    "tokens merged (2-D ToMe)": "no training",
    "steps reuse blocks": "a step-reuse cache, no training",
    "dense, fewer steps": "as many as the budget pays for, rounded down",
    "dense, fine-tuned": "trained on for as many steps, flow matching on images",
    "ours, a fifth of the steps": "of training",
    EARLY: "ours with `calibration.settle` 0.7 in the place of 0.4",
    FLOOR: "ours with `routing.min_keep_ratio` 0.45 and no block skipped",
    EARLY_FLOOR: "the same with `calibration.settle` 0.7",
    SHORTCUTS: "ours with `routing.shortcut_rank` 16",
    ERRORS_SHORTCUTS: "measured errors and `routing.shortcut_rank` 16",
    TWO_BINS: "the paper's estimator instead of `boundary`",
    "training-free": "ours with `calibration.steps: 0`",
    TRAINING_FREE_SHORTCUTS: "the same with `routing.shortcut_rank` 16",
}


def page(report: Report) -> str:
    """The whole page."""
    return "\n".join([*_head(report), *_tables(report), *_tail(report)]) + "\n"


def _head(report: Report) -> Iterator[str]:
    scale = report["conditions"]
    yield "# Quality at equal MACs"
    yield ""
    yield (
        f"Made by `python -m benchmarks.quality` on {report['date']} "
        "([quality.json](../benchmarks/results/quality.json)); change the script, not this page."
    )
    yield ""
    yield (
        f"Reference DiT (Fashion-MNIST, 256 tokens), {scale['samples']} samples, Euler without guidance. Figures are "
        f"{report['metric']}, lower is better, not comparable with Inception KID or FID; in brackets the smallest and "
        "largest over seeds, a seed being that of the training and of the noise, which all variants share. What is "
        f"trained is trained for {scale['calibration_steps']} steps of {scale['batch']} samples with the same optimizer "
        "or for as long as a table says. "
        f"Held-out real images score {scale['real_against_real_floor']['kid_x1000']:.2f}. *Steps distilled* "
        f"says that it was trained towards the dense model's own sampling in {scale['substeps']} smaller steps for each "
        f"step (`rollouts.substeps`), {scale['trajectories']:,} images of it from noise, in the place of training images. "
        "Bold rows are ours, with keep ratios learned by gradients or solved for over measured errors; *gradients less it* and "
        "*errors less it* are the differences of KID x 1000 seed by seed between the first row of either and this one, both "
        "with the same noise: below 0, ours is better. Runs were made on: "
        + ", ".join(f"{name} ({count})" for name, count in _devices(report))
        + "."
    )
    missing = report["missing"]
    if missing:
        yield ""
        yield (
            f"**Not complete:** {len(report['runs'])} of {len(report['runs']) + len(missing)} runs are done, the rest is listed "
            "under `missing` in the JSON; the same command goes on where it was. Rows with one seed have no spread, and "
            "differences of a few points between them mean little."
        )


def _devices(report: Report) -> list[tuple[str, int]]:
    return Counter(run["made"]["device"] for run in report["runs"]).most_common()


def _tables(report: Report) -> Iterator[str]:
    rows = report["summary"]
    keys = sorted(
        {(r["task"], r["budget"], r["steps"], r["training"]) for r in rows if r["budget"] < 1},
        key=lambda k: (k[0], k[2], -k[3], -k[1]),
    )
    for task, budget, steps, training in keys:
        mine = compared(rows, task, budget, steps, training)
        yield ""
        length = "" if training == FULL else f", trained for {_length(training)}"
        yield f"## {task.capitalize()}: {budget:.0%} of the MACs, {steps} steps{length}"
        yield ""
        if task == "inpainting":
            yield INPAINTING
            yield ""
        yield "| | KID x 1000 | gradients less it | errors less it | PSNR to dense, dB | MACs of the loop | seeds |"
        yield "|---|---|---|---|---|---|---|"
        against = [_against(report, way, task, budget, steps, training) for way in WAYS]
        for row in sorted(mine, key=lambda r: (r["budget"] < 1, r["kid_x1000"]["mean"])):
            yield _row(row, [found.get(row["variant"], []) for found in against])


def _length(training: float) -> str:
    scale = Scale().trained_for(training)
    return f"{scale.calibration_steps} steps of {scale.batch}"


def _against(
    report: Report, way: str, task: str, budget: float, steps: int, training: float
) -> dict[str, list[float]]:
    """One way of ours less each variant, seed by seed; said of generation with few steps only."""
    if (task, steps) != ("generation", report["conditions"]["few"]):
        return {}
    found = report[way].get(str(training), {}).get(str(budget), {"others": []})
    return {row["variant"]: row["by_seed"] for row in found["others"]}


def _row(row: Mapping[str, Any], by_seed: Sequence[Sequence[float]]) -> str:
    name, kid, psnr = row["variant"], row["kid_x1000"], row["psnr_to_dense_db"]
    digits = 1 if kid["mean"] >= SMALL else 2
    spread = (
        f" ({kid['min']:.{digits}f} to {kid['max']:.{digits}f})" if row["seeds"] > 1 else ""
    )
    base = name.removesuffix(DISTILLED)
    note = f": {NOTES[name]}" if name in NOTES else ""
    if name != base:
        note = ": the dense model" if base == "dense" else f": {NOTES[base]}"
    if row["steps_taken"] != row["steps"]:
        note += f", {row['steps_taken']} steps"
    label = f"**{name}**" if name in OUR_VARIANTS else name
    decibels = f"{psnr['mean']:.1f}" if psnr else "–"
    less = " | ".join(", ".join(f"{d:+.1f}" for d in found) or "–" for found in by_seed)
    return (
        f"| {label}{note} | {kid['mean']:.{digits}f}{spread} | {less} | {decibels} | "
        f"{row['macs']['mean']:.1%} | {row['seeds']} |"
    )


def _tail(report: Report) -> Iterator[str]:
    knee = report["knee"]
    by_steps = ", ".join(
        f"{steps}: {kid:.1f}" for steps, kid in knee["dense_by_steps"].items()
    )
    yield ""
    yield "## Where the dense model can leave steps out instead"
    yield ""
    yield f"The dense model by its number of steps: {by_steps}."
    for ours in knee["ours"]:
        yield (
            f"*{ours['variant'].capitalize()}* with {ours['steps']} steps costs as much as {ours['dense_steps_paid_for']:.1f} "
            f"dense steps; as good are {ours['dense_steps_as_good'] or 'more than the measured'} dense steps"
            + (f", {ours['dense_steps_worse']} are not." if ours["dense_steps_worse"] else ".")
        )
    yield ""
    yield "![KID against MACs](pictures/quality_against_macs.png)"
    for name, variants in report["sheets_top_to_bottom"].items():
        yield ""
        yield f"![samples](pictures/{name})"
        yield ""
        yield "Rows, top to bottom: " + ", ".join(variants) + "."
