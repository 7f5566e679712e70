"""The stand-in for TensorRT has no method that the real one lacks: checked against TensorRT-RTX, which has the same API.

That what they do is alike cannot be checked without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).parent / "fakes"
# class of the stand-in -> class of TensorRT
PAIRS = {
    "Logger": "Logger",
    "OnnxParser": "OnnxParser",
    "Builder": "Builder",
    "_Config": "IBuilderConfig",
    "_Profile": "IOptimizationProfile",
    "_TimingCache": "ITimingCache",
    "_Error": "ParserError",
    "Runtime": "Runtime",
    "_Engine": "ICudaEngine",
    "_Context": "IExecutionContext",
    "_RuntimeConfig": "IRuntimeConfig",
    "_Inspector": "EngineInspector",
    "IProgressMonitor": "IProgressMonitor",
}
# fields of the stand-ins that only tests read
OWN = {
    "alive", "facts", "session", "inputs", "outputs", "names", "logger", "network", "errors", "engine", "cache",
    "profiles", "workspace", "flags", "severity", "data", "shapes", "text", "ready", "memory", "addresses", "profile",
    "strategy", "specialization",
}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FAKES))
    import tensorrt

    yield tensorrt
    for name in [n for n in sys.modules if n in ("tensorrt", "cuda") or n.startswith("cuda.")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", PAIRS)
def test_a_stand_in_has_only_what_tensorrt_has(fake: Any, name: str) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    kind = getattr(real, PAIRS[name])
    public = {n for n in vars(getattr(fake, name)) if not n.startswith("_")} - OWN
    assert {n for n in public if not hasattr(kind, n)} == set()


def test_names_of_flags_and_enumerations_are_tensorrts(fake: Any) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for enumeration, members in (
        ("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"]),
        ("BuilderFlag", ["TF32"]),
        ("MemoryPoolType", ["WORKSPACE"]),
        ("ExecutionContextAllocationStrategy", ["USER_MANAGED"]),
        ("ProfilingVerbosity", ["DETAILED"]),
        ("LayerInformationFormat", ["JSON"]),
    ):
        for member in members:
            assert member in getattr(real, enumeration).__members__
            assert hasattr(getattr(fake, enumeration), member)
    attributes = ("progress_monitor", "profiling_verbosity")
    assert all(hasattr(real.IBuilderConfig, attribute) for attribute in attributes)
    assert hasattr(real.IOptimizationProfile, "extra_memory_target")
    assert hasattr(real.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert "EAGER" in real.DynamicShapesKernelSpecializationStrategy.__members__
    assert callable(real.nptype)
