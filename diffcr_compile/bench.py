"""Time whole sampling loops, dense against compressed, in turns in one process.

Shared machines drift, so only ratios of interleaved runs are quoted; each pair gives one ratio and
the median is reported with all of them.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffcr_compile.errors import UsageError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime import load
from diffcr_compile.runtime.dense import DenseRunner

Denoise = Callable[..., Any]
# Of graphs that ONNX Runtime's CPU does not run.
NOT_MEASURED: Mapping[str, Any] = {"onnxruntime_cpu_loop": None, "conditions": None}


def best_sampling_loops(
    folder: Path, timesteps: Sequence[float], repeats: int = 5
) -> dict[str, Any]:
    """Speed-up where the *dense* model is at its fastest: all cores in one loop, or a loop per core.

    A baseline that could be faster would flatter the artifact, so the dense model's times choose.

    Returns:
        What :func:`sampling_loops` returns, and under ``settings`` the same for both ways.
    """
    cores = os.cpu_count() or 1
    ways = [sampling_loops(folder, timesteps, repeats, threads=cores)]
    if cores > 1:
        ways.append(sampling_loops(folder, timesteps, repeats, threads=1, loops=cores))

    def dense_seconds_per_loop(way: Mapping[str, Any]) -> float:
        conditions = way["conditions"]
        return float(statistics.median(conditions["dense_seconds"]) / conditions["loops"])

    fastest: dict[str, Any] = min(ways, key=dense_seconds_per_loop)
    return {**fastest, "settings": ways}


def sampling_loops(
    folder: Path,
    timesteps: Sequence[float],
    repeats: int = 5,
    threads: int | None = None,
    loops: int = 1,
) -> dict[str, Any]:
    """Speed-up of the artifact over its dense baseline on ONNX Runtime CPU.

    Args:
        folder: an artifact with ``baseline/dense.onnx``.
        timesteps: values of the timestep input, in sampling order.
        repeats: pairs of loops that are timed, after one that is not.
        threads: threads inside an operator; None for ONNX Runtime's default.
        loops: sampling loops that run side by side, each with a batch and a session of its own.

    Returns:
        ``onnxruntime_cpu_loop`` (median ratio of the pairs) and ``conditions``.
    """
    runners = [load(folder, threads=threads) for _ in range(loops)]
    denses = [DenseRunner(folder / "baseline/dense.onnx", threads) for _ in range(loops)]
    manifest = runners[0].manifest
    inputs = example_arrays(manifest)

    def side_by_side(denoisers: Sequence[Denoise]) -> None:
        running = [pool.submit(_loop, d, inputs, manifest, timesteps) for d in denoisers]
        for loop in running:
            loop.result()

    with concurrent.futures.ThreadPoolExecutor(loops) as pool:
        seconds = interleaved(
            {
                "dense": lambda: side_by_side(denses),
                "compressed": lambda: side_by_side(runners),
            },
            repeats,
        )
    pairs = [d / c for d, c in zip(seconds["dense"], seconds["compressed"], strict=True)]
    return {
        "onnxruntime_cpu_loop": statistics.median(pairs),
        "conditions": {
            "steps": len(timesteps),
            "batch": batch_of(manifest),
            "repeats": repeats,
            "threads": threads or os.cpu_count(),
            "loops": loops,
            "dense_seconds": seconds["dense"],
            "compressed_seconds": seconds["compressed"],
            "pair_ratios": pairs,
        },
    }


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, the runs taking turns; the first round warms up and is not counted."""
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def example_arrays(manifest: Manifest, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the right names, shapes and types, from the first golden file's recipe: noise and zeros."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in manifest.inputs:
        dtype = np.dtype(spec["dtype"])
        if np.issubdtype(dtype, np.floating):
            arrays[spec["name"]] = generator.standard_normal(spec["shape"]).astype(dtype)
        else:
            arrays[spec["name"]] = np.zeros(spec["shape"], dtype)
    return arrays


def batch_of(manifest: Manifest) -> int:
    """Batch size that the graphs were built for."""
    return int(max(manifest.inputs, key=lambda spec: len(spec["shape"]))["shape"][0])


def _loop(
    denoise: Denoise,
    inputs: Mapping[str, np.ndarray],
    manifest: Manifest,
    timesteps: Sequence[float],
) -> None:
    """Euler-like loop; where the output is no velocity of the sample's shape, the sample stays."""
    sample, timestep = manifest.sample_input, manifest.timestep_input
    if timestep is None:
        raise UsageError(
            "the artifact does not know its timestep input, so there is no sampling loop"
        )
    call = dict(inputs)
    for value in timesteps:
        call[timestep] = np.full_like(inputs[timestep], value)
        output = denoise(**call)
        first = output[0] if isinstance(output, tuple) else output
        if sample is not None and first.shape == call[sample].shape:
            call[sample] = call[sample] - first / len(timesteps)
