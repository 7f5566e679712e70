"""Sampling loops in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import UsageError

Array = npt.NDArray[Any]


def euler_flow(
    denoise: Callable[[Array, float], Array],
    noise: Array,
    steps: int,
    *,
    timestep_scale: float = 1000.0,
    callback: Callable[[int, int, Array], None] | None = None,
) -> Array:
    """Sample a flow-matching model: x_t = (1 - t) x + t noise, v = noise - x, Euler from t = 1 to 0.

    Args:
        denoise: ``denoise(x, timestep)`` returns v in the shape of x; timestep is a float in
            (0, `timestep_scale`].
        noise: standard normal, the start; its dtype is kept.
        steps: equal steps, at least 1.
        timestep_scale: the timestep input at t = 1.
        callback: called after each step with (steps done, steps, x).

    Returns:
        The sample, in the shape and dtype of `noise`.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    x = noise
    # 1 - i / steps, not a running sum: timesteps then hit bucket edges exactly.
    times = [1 - step / steps for step in range(steps + 1)]
    for step in range(steps):
        velocity = np.asarray(denoise(x, timestep_scale * times[step]))
        if velocity.shape != x.shape:
            raise UsageError(
                f"denoise returned shape {velocity.shape} for a sample of shape {x.shape}; a "
                "flow-matching model predicts a velocity of the sample's shape"
            )
        x = (x + (times[step + 1] - times[step]) * velocity).astype(noise.dtype)
        if callback is not None:
            callback(step + 1, steps, x)
    return x
