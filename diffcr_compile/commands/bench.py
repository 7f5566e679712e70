"""``diffcr bench``: time sampling loops, dense against compressed."""

from __future__ import annotations

from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, Folder
from diffcr_compile.commands.terminal import print_json, say

EXAMPLES = ("out/", "out/ --steps 50 --threads 1 --loops 2 --json")


def register(app: App) -> None:
    """Add the verb."""
    app.verb("bench", EXAMPLES)(bench)


def bench(
    out: Folder,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of loops")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of ONNX Runtime")] = None,
    loops: Annotated[int, typer.Option(min=1, help="loops side by side")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time sampling loops, dense against compressed, in turns. Writes nothing.

    Without --threads: all cores in one loop, and a loop per core; the faster way of the dense model counts.
    """
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
