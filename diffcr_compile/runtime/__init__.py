"""Runs artifacts with numpy and ONNX Runtime; neither torch nor onnx is needed.

from diffcr_compile import runtime
runner = runtime.load("out/")
velocity = runner(hidden_states=x, timestep=t, class_labels=labels)
"""

from __future__ import annotations

import os
from typing import Any

from diffcr_compile.runtime.runner import Runner
from diffcr_compile.runtime.sampler import euler_flow

__all__ = ["Runner", "euler_flow", "load"]


def load(folder: str | os.PathLike[str], **options: Any) -> Runner:
    """A runner for an artifact; for the options see :class:`Runner`."""
    return Runner(folder, **options)
