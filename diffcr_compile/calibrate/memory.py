"""Out of memory, said in words: what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from diffcr_compile.errors import ResourceError

# torch has a class of its own for devices only; the CPU's allocator raises a plain RuntimeError
CPU_MESSAGES = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator")


@contextlib.contextmanager
def out_of_memory_in_words(advice: str) -> Iterator[None]:
    """Turn every way in which memory runs out into one error.

    Args:
        advice: the settings to lower, in the order in which they are worth trying.

    Raises:
        ResourceError: memory ran out in the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = str(error).strip().splitlines()
        raise ResourceError(
            f"out of memory ({found[0] if found else type(error).__name__}). Lower {advice}, and run "
            "again: it goes on from the last saved state where no setting that it depends on changed.",
            code="DCR-R010",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(message in str(error) for message in CPU_MESSAGES)
