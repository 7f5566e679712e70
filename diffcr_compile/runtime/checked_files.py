"""Files whose hashes were right when an artifact was loaded, looked at again before one is opened.

Sessions are made at the first use of a timestep bucket, which may be long after the check; an artifact that was
made anew in the same folder meanwhile would give one runner graphs of two models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffcr_compile.manifest import Manifest, Stamp, check_file_again


class CheckedFiles:
    """The files of an artifact, and how each looked when its hash was right.

    Args:
        folder: the artifact.
        manifest: its manifest.
        seen: what :func:`diffcr_compile.manifest.verify_artifact` returned.
    """

    def __init__(self, folder: Path, manifest: Manifest, seen: Mapping[str, Stamp]) -> None:
        self._folder, self._manifest, self._seen = folder, manifest, dict(seen)

    @contextlib.contextmanager
    def opening(self, *names: str) -> Iterator[None]:
        """What is opened while the context lasts are the files that the manifest lists.

        Args:
            names: of the files, relative to the artifact.

        Raises:
            ArtifactError: one is gone or has another hash.
        """
        self._check(names)
        yield
        self._check(names)  # it may have been replaced just before it was read

    def _check(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._seen[name] = check_file_again(
                self._folder, self._manifest, name, self._seen[name]
            )
