"""ONNX Runtime as a backend: a session per graph, made at its first use."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.backend import Provider, check_provider, make_session

Array = npt.NDArray[Any]


class OnnxBackend:
    """Runs timestep buckets in ONNX Runtime.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        provider: ``cpu`` or ``cuda``.
        threads: threads inside an operator; None for ONNX Runtime's default.

    Raises:
        UsageError: there is no such provider.
        EnvironmentMissingError: the installed ONNX Runtime does not have it.
    """

    def __init__(
        self, artifact: Path, manifest: Manifest, provider: Provider, threads: int | None
    ) -> None:
        check_provider(provider)
        self._artifact, self._manifest = artifact, manifest
        self._provider, self._threads = provider, threads
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, bucket: int, arrays: Mapping[str, Array]) -> list[Array]:
        """Outputs of a timestep bucket, in graph order."""
        outputs: list[Array] = self._session(bucket).run(None, arrays)
        return outputs

    def close(self) -> None:
        """Let go of the sessions; the next run makes new ones."""
        with self._lock:
            self._sessions.clear()

    def _session(self, bucket: int) -> Any:
        """The session of a bucket; buckets with one graph share one."""
        name = self._manifest.buckets[bucket]["onnx"]
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = make_session(
                    self._artifact / name, self._provider, self._threads
                )
            return self._sessions[name]
