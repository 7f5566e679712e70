"""ONNX Runtime as a backend: sessions over the graphs of an artifact, made at their first use."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import EnvironmentMissingError, ResourceError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.backend import Provider, check_provider, make_session, run_session
from diffcr_compile.runtime.checked_files import CheckedFiles

Array = npt.NDArray[Any]
# Weights of which one copy for each graph is too many. A session copies its weights into the layout that its
# kernels like, and sessions do not share such copies; one session with K open costs 1 to 3 % of speed.
MANY_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class BucketGraph:
    """What a timestep bucket runs.

    Attributes:
        onnx: path relative to the artifact.
        lengths: inputs whose length says how many tokens a block keeps, with that length.
    """

    onnx: str
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)


def bucket_graphs(manifest: Manifest, share_weights: bool | None) -> tuple[BucketGraph, ...]:
    """The graph of each bucket: its static one, or one with K open that serves several buckets.

    Args:
        manifest: of the artifact. Where no graph of it has K open, the static ones are taken.
        share_weights: whether buckets share a session; None shares where copies of the weights would
            be large.
    """
    static = [BucketGraph(row["onnx"]) for row in manifest.buckets]
    if share_weights is None:
        weights = int(manifest.files[manifest.weights]["bytes"])
        share_weights = weights >= MANY_BYTES and len({graph.onnx for graph in static}) > 1
    if not share_weights:
        return tuple(static)
    for row in manifest.profile_graphs:
        for bucket in row["buckets"]:
            lengths = {
                name: int(manifest.schedule[block][bucket])
                for name, block in row["kept_inputs"].items()
            }
            static[bucket] = BucketGraph(row["onnx"], lengths)
    return tuple(static)


def check_precision(manifest: Manifest, provider: Provider) -> None:
    """Raise EnvironmentMissingError if a provider of ONNX Runtime lacks the kernels for an artifact's types."""
    if provider == "cpu" and not manifest.runs_on_cpu:
        raise EnvironmentMissingError(
            "this artifact computes in bf16, for which ONNX Runtime has no kernels on the CPU. Run it with "
            "provider='cuda' or as engines (diffcr build); diffcr validate checks it here all the same. For the CPU "
            "export with precision fp32.",
            code="DCR-E014",
        )


class OnnxBackend:
    """Runs timestep buckets in ONNX Runtime.

    Args:
        artifact: the artifact's folder.
        graphs: of each bucket, see :func:`bucket_graphs`.
        provider: ``cpu`` or ``cuda``.
        threads: threads inside an operator; None for ONNX Runtime's default.
        weights: file of the weights that the graphs read.
        checked: the files of the artifact, to be looked at again when one is opened; None to trust them.

    Raises:
        UsageError: there is no such provider.
        EnvironmentMissingError: the installed ONNX Runtime does not have it.
    """

    def __init__(
        self,
        artifact: Path,
        graphs: tuple[BucketGraph, ...],
        provider: Provider,
        threads: int | None,
        weights: str,
        checked: CheckedFiles | None,
    ) -> None:
        check_provider(provider)
        self._artifact, self.graphs, self._weights = artifact, graphs, weights
        self._provider, self._threads, self._checked = provider, threads, checked
        self._closed = False
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        # Only their lengths are read.
        self._lengths = [
            {name: np.zeros(kept, np.float32) for name, kept in graph.lengths.items()}
            for graph in graphs
        ]

    def run(self, bucket: int, arrays: Mapping[str, Array]) -> list[Array]:
        """Outputs of a timestep bucket, in graph order.

        Raises:
            UsageError: an input has a value that the graph cannot take.
            ArtifactError: at the first use of a graph, it is not the one that was loaded any more.
            ResourceError: the backend was closed.
        """
        given = {**arrays, **self._lengths[bucket]}
        return run_session(self._session(bucket), given, f"timestep bucket {bucket}")

    def close(self) -> None:
        """Let go of the sessions; further runs are refused."""
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def _session(self, bucket: int) -> Any:
        """The session of a bucket; buckets with one graph share one."""
        name = self.graphs[bucket].onnx
        with self._lock:
            if self._closed:
                raise ResourceError("this runner was closed; load the artifact again")
            if name not in self._sessions:
                with self._opening(name):
                    session = make_session(
                        self._artifact / name, self._provider, self._threads
                    )
                self._sessions[name] = session
            return self._sessions[name]

    def _opening(self, graph: str) -> contextlib.AbstractContextManager[None]:
        if self._checked is None:
            return contextlib.nullcontext()
        return self._checked.opening(graph, self._weights)
