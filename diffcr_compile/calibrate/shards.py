"""Data that is made in shards, each a file: what is interrupted goes on, and ranks share the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.tensor_file import write_tensors

MARKER = "rollouts.key"
Shard = dict[str, Tensor]


def made_in_shards(
    count: int,
    make: Callable[[int], Shard],
    folder: Path | None = None,
    progress: PhaseProgress | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    key: str | None = None,
) -> list[Shard]:
    """All shards, in order; those that a folder holds are not made again.

    Several ranks take turns in making them and read each other's from the folder. Without one, each
    makes all of them.

    Args:
        count: how many.
        make: shard number -> tensors; what it makes depends on the number only.
        folder: where finished shards are kept, common to all ranks; None keeps them in memory only.
        progress: called with ("rollouts", done, all).
        ranks: who shares the work.
        key: fingerprint of what the shards depend on. Those that the folder holds of another one are deleted first;
            None where the folder is for these shards only.

    Raises:
        ArtifactError: a file is damaged.
        UsageError: the folder is not common to the ranks.
    """
    if folder is not None and key is not None:
        if ranks.leads:
            _forget_others(folder, key)
        ranks.wait()  # until nothing of other settings lies there any more
    shards: list[Shard] = []
    together = ranks.count if folder else 1
    for first in range(0, count, together):
        numbers = range(first, min(first + together, count))
        for number in numbers:
            if folder is None:
                shards.append(make(number))
            elif number % ranks.count == ranks.rank and not _path(folder, number).exists():
                write_tensors(_path(folder, number), make(number))
        if folder is not None:
            ranks.wait()
            shards += [_load(_path(folder, number), number, ranks) for number in numbers]
        if progress:
            progress("rollouts", len(shards), count)
    return shards


def _forget_others(folder: Path, key: str) -> None:
    """Shards of other settings must not be taken for ours."""
    marker = folder / MARKER
    if marker.exists() and marker.read_text() == key:
        return
    for shard in folder.glob("rollouts_*.safetensors"):
        shard.unlink()
    atomic_write_bytes(marker, key.encode())


def _path(folder: Path, number: int) -> Path:
    return folder / f"rollouts_{number:04d}.safetensors"


def _load(path: Path, number: int, ranks: Ranks) -> Shard:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UsageError(
            f"rank {number % ranks.count} made {path}, but rank {ranks.rank} does not see it. Ranks "
            "share rollouts through the output folder; name one that all machines have in common.",
            code="DCR-U071",
        ) from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); it was changed from outside. Delete it: it is made again."
        ) from error
