"""How far the compressed model's sampling trajectory leaves the dense one's, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.bench import example_arrays
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime import load
from diffcr_compile.runtime.dense import DenseRunner

Array = npt.NDArray[Any]


def trajectory_drift(folder: Path, timesteps: Sequence[float]) -> dict[str, Any] | None:
    """Relative L2 distance of the samples after each step of one loop from the same noise.

    The loop is Euler's on the model's output as a velocity, as in the benchmark; where a model predicts
    something else it is not the model's own sampler, and only says how errors add up.

    Args:
        folder: an artifact with ``baseline/dense.onnx``.
        timesteps: values of the timestep input, in sampling order.

    Returns:
        ``timesteps`` and ``relative_l2``, one per step; None where the output has not the sample's shape.
    """
    runner = load(folder)
    manifest = runner.manifest
    if manifest.sample_input is None or manifest.timestep_input is None:
        return None
    dense = _samples(DenseRunner(folder / "baseline/dense.onnx"), manifest, timesteps)
    compressed = _samples(runner, manifest, timesteps)
    if dense is None or compressed is None:
        return None
    return {
        "timesteps": [float(t) for t in timesteps],
        "relative_l2": [_distance(c, d) for c, d in zip(compressed, dense, strict=True)],
    }


def _samples(
    denoise: Callable[..., Any], manifest: Manifest, timesteps: Sequence[float]
) -> list[Array] | None:
    """The sample after each step."""
    assert manifest.sample_input is not None
    assert manifest.timestep_input is not None
    call = example_arrays(manifest)
    found = []
    for value in timesteps:
        call[manifest.timestep_input] = np.full_like(call[manifest.timestep_input], value)
        output = denoise(**call)
        first = output[0] if isinstance(output, tuple) else output
        sample = call[manifest.sample_input]
        if first.shape != sample.shape:
            return None
        call[manifest.sample_input] = (sample - first / len(timesteps)).astype(sample.dtype)
        found.append(call[manifest.sample_input])
    return found


def _distance(one: Array, two: Array) -> float:
    scale = float(np.linalg.norm(two.astype(np.float64)))
    return float(np.linalg.norm(one.astype(np.float64) - two)) / max(scale, 1e-30)
