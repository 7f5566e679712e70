"""Run an artifact: check the call, pick the timestep bucket by value, run its static graph."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import UsageError, one_line
from diffcr_compile.manifest import read_manifest, verify_artifact
from diffcr_compile.runtime.backend import Provider
from diffcr_compile.runtime.checked_files import CheckedFiles
from diffcr_compile.runtime.complex_inputs import as_graph_input
from diffcr_compile.runtime.onnx_backend import (
    BucketGraph,
    OnnxBackend,
    bucket_graphs,
    check_precision,
)
from diffcr_compile.runtime.onnx_structure import check_onnx
from diffcr_compile.runtime.open_engines import open_engines

Array = npt.NDArray[Any]
BackendName = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


class Backend(Protocol):
    """What runs the graph of a timestep bucket."""

    def run(self, bucket: int, arrays: Mapping[str, Array]) -> list[Array]: ...
    def close(self) -> None: ...


class Runner:
    """A compiled model, called with keyword arrays like the model it was made from.

    Args:
        folder: the artifact.
        backend: ``onnxruntime``, or ``tensorrt`` for engines that were built on this device.
        provider: of ONNX Runtime: ``cpu`` or ``cuda``.
        threads: of ONNX Runtime: threads inside an operator; None for its default.
        share_weights: of ONNX Runtime: run all buckets in one session, whose graph has K open, so that the
            weights are in memory once, at 1 to 3 % of speed. None does so where there are several graphs
            over many weights.
        swap: of TensorRT: keep only the current timestep bucket in memory. It takes a change of the
            bucket as long as reading an engine from disk, and as little memory as one bucket.
        cuda_graphs: of TensorRT: replay recorded work where CUDA can record it.
        verify: check every file that is used against the manifest or the engines' sidecar first. ONNX
            Runtime opens a graph at the first use of its timestep bucket: files that look otherwise by then
            are hashed again. Switch it off only where the artifact was checked before, as in a process that is started
            often.

    Raises:
        UsageError: an option that the backend does not have.
        ArtifactError: a file is missing or is not the one that was written, or there are no engines
            that may run on this device.
        EnvironmentMissingError: the backend, the provider or the device is not there, or the CPU has no kernels
            for the artifact's precision.
        ResourceError: the device has too little memory.

    Attributes:
        folder: the artifact.
        manifest: what was built.
        backend: what runs the graphs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        backend: BackendName = "onnxruntime",
        provider: Provider = "cpu",
        threads: int | None = None,
        share_weights: bool | None = None,
        swap: bool = False,
        cuda_graphs: bool = True,
        verify: bool = True,
    ) -> None:
        if backend not in get_args(BackendName):
            raise UsageError(
                f"backend must be one of {list(get_args(BackendName))}, got {backend!r}"
            )
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._highs = [float(bucket["high"]) for bucket in self.manifest.buckets]
        self.backend: Backend
        if backend == "onnxruntime":
            if swap:
                raise UsageError("swap=True is for engines: backend='tensorrt'")
            checked = None
            if verify:  # before anything follows a path or a number in the manifest
                seen = verify_artifact(self.folder, self.manifest)
                checked = CheckedFiles(self.folder, self.manifest, seen)
            check_precision(self.manifest, provider)
            graphs = bucket_graphs(self.manifest, share_weights)
            if verify:
                self._verify_graphs(graphs)
            self.backend = OnnxBackend(
                self.folder, graphs, provider, threads, self.manifest.weights, checked
            )
            return
        if provider != "cpu" or threads is not None or share_weights is not None:
            raise UsageError(
                f"provider, threads and share_weights are ONNX Runtime's, not of {backend!r}"
            )
        self.backend = open_engines(
            self.folder,
            self.manifest,
            backend,
            swap=swap,
            cuda_graphs=cuda_graphs,
            verify=verify,
        )

    def close(self) -> None:
        """Give memory back: engines, contexts, sessions; further calls are refused."""
        self.backend.close()

    def _verify_graphs(self, graphs: Sequence[BucketGraph]) -> None:
        weights = self.folder / self.manifest.weights
        for graph in {graph.onnx: graph for graph in graphs}.values():
            open_lengths = [
                {"name": name, "dtype": "float32", "shape": [-1]} for name in graph.lengths
            ]
            check_onnx(
                self.folder / graph.onnx, weights, [*self.manifest.inputs, *open_lengths]
            )

    def __call__(self, **inputs: Any) -> Any:
        """Run one step.

        Args:
            inputs: one array per input, or anything that numpy can read without a copy.

        Returns:
            The output array, or a tuple of them if the model has several.

        Raises:
            UsageError: an input is missing, unknown, of another shape or type, nothing that numpy can read, or
                has values that the graph cannot take; or the timesteps of the call belong to different buckets.
            ArtifactError: a graph is needed for the first time, and its file was changed since the load.
            ResourceError: the runner was closed.
        """
        arrays = self._checked(inputs)
        outputs = self.backend.run(self._bucket(arrays), arrays)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def bucket_of(self, timestep: float) -> int:
        """Index of the bucket (low, high] of a timestep value.

        The first bucket takes everything below it, the last one everything above.
        """
        value = float(timestep)
        if not math.isfinite(value):
            raise UsageError(f"timestep must be a finite number, got {value}", code="DCR-U022")
        return min(bisect.bisect_left(self._highs, value), len(self._highs) - 1)

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        built = {spec["name"]: spec for spec in self.manifest.inputs}
        missing = [name for name in built if name not in inputs]
        unknown = [name for name in inputs if name not in built]
        if missing or unknown:
            raise UsageError(
                f"inputs missing: {missing}, unknown: {unknown}. This artifact was built for "
                f"{self._signature()}",
                code="DCR-U020",
            )
        arrays = {name: self._array(spec, inputs[name]) for name, spec in built.items()}
        for name, array in arrays.items():
            dtype, shape = built[name]["dtype"], tuple(built[name]["shape"])
            if array.shape != shape:
                raise UsageError(
                    f"{name} has shape {array.shape}, expected {shape}: shapes are fixed when an "
                    f"artifact is built. It was built for {self._signature()}",
                    code="DCR-U021",
                )
            if array.dtype != np.dtype(dtype):
                raise UsageError(
                    f"{name} is {array.dtype}, expected {dtype}; pass {name}.astype('{dtype}'). "
                    f"This artifact was built for {self._signature()}",
                    code="DCR-U021",
                )
        # the manifest says what the caller passes; a graph takes complex numbers as real pairs
        return {name: as_graph_input(array) for name, array in arrays.items()}

    def _array(self, spec: Mapping[str, Any], value: Any) -> Array:
        """The input as an array, if numpy can read it."""
        try:
            return np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            name, kind = spec["name"], type(value)
            number = ".float()" if spec["dtype"] == "float32" else ""
            raise UsageError(
                f"{name} is a {kind.__module__}.{kind.__qualname__} that numpy cannot read: {one_line(error)}. Pass an "
                f"array; of a tensor of torch, {name}.detach(){number}.cpu().numpy(). This artifact was built for "
                f"{self._signature()}",
                code="DCR-U021",
            ) from error

    def _bucket(self, arrays: Mapping[str, Array]) -> int:
        name = self.manifest.timestep_input
        if name is None:  # then there is only one bucket
            return 0
        values = np.unique(arrays[name].astype(np.float64))
        found = {self.bucket_of(value) for value in values}
        if len(found) > 1:
            ranges = [(b["low"], b["high"]) for b in self.manifest.buckets]
            raise UsageError(
                f"{name} {values.tolist()} lies in the timestep buckets {sorted(found)}, but one call "
                f"runs one bucket. Split the call; the buckets (low, high] are {ranges}",
                code="DCR-U022",
            )
        return found.pop()

    def _signature(self) -> str:
        return ", ".join(f"{s['name']} {s['dtype']}{s['shape']}" for s in self.manifest.inputs)
