"""Run an artifact: check the call, pick the timestep bucket by value, run its static graph."""

from __future__ import annotations

import bisect
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import UsageError
from diffcr_compile.manifest import read_manifest, verify_artifact
from diffcr_compile.runtime.backend import Provider, check_provider, make_session
from diffcr_compile.runtime.complex_inputs import as_graph_input
from diffcr_compile.runtime.onnx_structure import check_onnx

Array = npt.NDArray[Any]


class Runner:
    """A compiled model, called with keyword arrays like the model it was made from.

    Args:
        folder: the artifact.
        provider: ``cpu`` or ``cuda``.
        threads: threads inside an operator; None for ONNX Runtime's default.
        verify: check every file against the manifest first. Switch it off only where the artifact
            was checked before, as in a process that is started often.

    Raises:
        ArtifactError: a file is missing or is not the one that was written.
        EnvironmentMissingError: the provider is not there.

    Attributes:
        folder: the artifact.
        manifest: what was built.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if verify:
            verify_artifact(self.folder, self.manifest)
            weights = self.folder / self.manifest.weights
            for bucket in self.manifest.buckets:
                check_onnx(self.folder / bucket["onnx"], weights, self.manifest.inputs)
        check_provider(provider)
        self._provider = provider
        self._threads = threads
        self._highs = [float(bucket["high"]) for bucket in self.manifest.buckets]
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, **inputs: Any) -> Any:
        """Run one step.

        Args:
            inputs: one array per input, or anything that numpy can read without a copy.

        Returns:
            The output array, or a tuple of them if the model has several.

        Raises:
            UsageError: an input is missing, unknown, of another shape or type, or the timesteps
                of the call belong to different buckets.
        """
        arrays = self._checked(inputs)
        outputs = self._session(self._bucket(arrays)).run(None, arrays)
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
        arrays = {name: np.asarray(inputs[name]) for name in built}
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

    def _session(self, bucket: int) -> Any:
        """The session of a bucket, made at its first use; buckets with one graph share one."""
        name = self.manifest.buckets[bucket]["onnx"]
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = make_session(
                    self.folder / name, self._provider, self._threads
                )
            return self._sessions[name]

    def _signature(self) -> str:
        return ", ".join(f"{s['name']} {s['dtype']}{s['shape']}" for s in self.manifest.inputs)
