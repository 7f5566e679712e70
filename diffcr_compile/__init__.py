"""Compile a diffusion transformer into token-compressed static graphs.

    import diffcr_compile as dcr
    artifact = dcr.compile(model, "out/", example_inputs=inputs, budget="60%")

Names are loaded on first use, so that ``import diffcr_compile.runtime`` on a device needs neither
torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "diffcr_compile.api",
    "CompileConfig": "diffcr_compile.config",
    "DiffusersTransformer": "diffcr_compile.drop_in",
    "FlowEuler": "diffcr_compile.calibrate.samplers",
    "KeepRatios": "diffcr_compile.schedule",
    "LatentStates": "diffcr_compile.calibrate.latents",
    "Plan": "diffcr_compile.api",
    "SchedulerSampler": "diffcr_compile.calibrate.samplers",
    "TimestepBuckets": "diffcr_compile.schedule",
    "TokenSchedule": "diffcr_compile.schedule",
    "calibrate": "diffcr_compile.api",
    "compile": "diffcr_compile.api",
    "export": "diffcr_compile.api",
    "freeze": "diffcr_compile.api",
    "inspect": "diffcr_compile.api",
    "load": "diffcr_compile.runtime",
    "remove": "diffcr_compile.undo",
    "route": "diffcr_compile.api",
    "suggest": "diffcr_compile.suggestions",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffcr_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
