"""``diffcr bench``: time sampling loops, dense against compressed; or what each block costs by kept tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.bench_table import MeasureOptions, bench_table
from diffcr_compile.commands.options import (
    AsJson,
    Config,
    DryRun,
    Inputs,
    PipelineFile,
    Settings,
    refuse_idle,
)
from diffcr_compile.commands.terminal import print_json, say

EXAMPLES = (
    "out/",
    "out/ --steps 50 --threads 1 --loops 2 --json",
    "demo --table table.json --threads 1",
    "python:my_model:make --kit kit/",
)
_MODEL = "Latency table"
STEPS, REPEATS = 20, 5
STABILITY, ROUNDS = 0.02, 60


def register(app: App) -> None:
    """Add the verb."""
    app.verb("bench", EXAMPLES)(bench)


def bench(
    out: Annotated[
        str, typer.Argument(help="an artifact's folder; a MODEL with --table or --kit")
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"sampling steps [default: {STEPS}]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help=f"pairs of loops [default: {REPEATS}]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of an operator")] = None,
    loops: Annotated[
        int | None, typer.Option(min=1, help="loops side by side [default: 1]")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="measure a latency table into this file", rich_help_panel=_MODEL),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(
            help="write a folder that measures the table on a device", rich_help_panel=_MODEL
        ),
    ] = None,
    backend: Annotated[
        Literal["onnxruntime", "torch"] | None,
        typer.Option(
            help="what runs the blocks [default: onnxruntime]", rich_help_panel=_MODEL
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="where [default: cpu]", rich_help_panel=_MODEL),
    ] = None,
    stability: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help=f"standard error that a figure may have, of its dense block [default: {STABILITY}]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=7, help=f"most rounds per block [default: {ROUNDS}]", rich_help_panel=_MODEL
        ),
    ] = None,
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Time sampling loops, dense against compressed, in turns, and write nothing; or, with --table, each block.

    Without --threads: all cores in one loop, and a loop per core; the faster way of the dense model counts.
    A latency table says what each routed block costs by kept tokens; budget.metric=latency solves over it.
    """
    of_model = {
        "--config": config,
        "--set": set_ or None,
        "--inputs": inputs,
        "--pipeline-inputs": pipeline_inputs,
    }
    of_table = {
        "--backend": backend,
        "--device": device,
        "--stability": stability,
        "--rounds": rounds,
    }
    of_loops = {"--steps": steps, "--repeats": repeats, "--loops": loops}
    if table is None and kit is None:
        _refuse({**of_model, **of_table}, "without --table or --kit, which measure a model")
        _loops(Path(out), steps or STEPS, repeats or REPEATS, threads, loops or 1, as_json)
        return
    _refuse(of_loops, "with --table or --kit, which measure blocks and no sampling loop")
    if table is None:
        _refuse(
            {**of_table, "--threads": threads}, "with --kit alone, which measures nothing here"
        )
    if dry_run:
        files = [str(path) for path in (table, kit) if path is not None]
        if as_json:
            print_json({"would_write": files, "written": False})
        else:
            say(f"would measure the blocks of {out} and write {' and '.join(files)}")
        return
    options = MeasureOptions(
        backend or "onnxruntime",
        device or "cpu",
        threads,
        stability or STABILITY,
        rounds or ROUNDS,
    )
    bench_table(out, table, kit, options, (config, set_, inputs, pipeline_inputs), as_json)


def _refuse(options: Mapping[str, object], where: str) -> None:
    refuse_idle([option for option, value in options.items() if value is not None], where)


def _loops(
    out: Path, steps: int, repeats: int, threads: int | None, loops: int, as_json: bool
) -> None:
    from diffcr_compile.bench import best_sampling_loops, sampling_loops
    from diffcr_compile.manifest import read_manifest

    buckets = read_manifest(out).buckets
    low, high = buckets[0]["low"], buckets[-1]["high"]
    timesteps = [high - (high - low) * i / steps for i in range(steps)]
    if threads is None and loops == 1:
        result = best_sampling_loops(out, timesteps, repeats)
    else:
        result = sampling_loops(out, timesteps, repeats, threads, loops)
    if as_json:
        print_json(result)
        return
    for way in result.get("settings", [result]):
        conditions = way["conditions"]
        pairs = conditions["pair_ratios"]
        say(
            f"dense / compressed: {way['onnxruntime_cpu_loop']:.2f} x (median of {len(pairs)} pairs, "
            f"{min(pairs):.2f} to {max(pairs):.2f}; {steps} steps, batch {conditions['batch']}, "
            f"loops {conditions['loops']}, threads {conditions['threads']})"
        )
