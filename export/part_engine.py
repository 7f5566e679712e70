"""An engine of the first part of a graph, built and run once: for the search of the block that is off."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from diffcr_compile.durable import atomic_write_bytes, passing_file
from diffcr_compile.engine_plan import EnginePlan, EngineSpec, LengthsSpec, ProfileSpec
from diffcr_compile.export.device.job import BuildSettings
from diffcr_compile.export.device.tensorrt_api import build_engine
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.engine_files import Sidecar, made_from, plan_file, read_plan_file
from diffcr_compile.runtime.open_engines import open_device
from diffcr_compile.runtime.tensorrt_backend import TensorRTBackend

Array = npt.NDArray[Any]


class Value(Protocol):
    """A value of the graph; :class:`diffcr_compile.export.block_values.BlockValue` is one."""

    @property
    def value(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


def run_part(
    artifact: Path,
    manifest: Manifest,
    graph: str,
    values: Sequence[Value],
    inputs: Mapping[str, Array],
    runtime: str = "tensorrt",
) -> list[Array]:
    """Values of a graph, computed by an engine that has them as its outputs.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        graph: path of a static graph.
        values: wanted.
        inputs: of the graph.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
    """
    from diffcr_compile.export.bisect import load_graph, with_outputs  # needs onnx

    trt, cuda, here = open_device(runtime)
    part = with_outputs(load_graph(artifact / graph), [value.value for value in values])
    used = {value.name for value in part.graph.input}
    outputs = [{"name": v.value, "dtype": v.dtype, "shape": list(v.shape)} for v in values]
    bucket = {**manifest.buckets[0], "index": 0}
    small = dataclasses.replace(manifest, outputs=outputs, buckets=[bucket], profile_graphs=[])
    with (
        passing_file((artifact / graph).parent, "part.", part.SerializeToString()) as file,
        tempfile.TemporaryDirectory() as folder,
    ):
        plan = build_engine(trt, file, [{}], BuildSettings())
        path = Path(folder) / plan_file("part")
        atomic_write_bytes(path, plan)
        profile = ProfileSpec((LengthsSpec((0,), {}),))
        spec = EnginePlan("per_bucket", (EngineSpec("part", graph, (profile,)),))
        files = {"part": read_plan_file(path)}
        sidecar = Sidecar(here, made_from(manifest), spec, files, {}, False, "")
        backend = TensorRTBackend(
            artifact, small, path.parent, sidecar, trt, cuda, cuda_graphs=False
        )
        try:
            return backend.run(0, {k: v for k, v in inputs.items() if k in used})
        finally:
            backend.close()
