"""One run at a time in a folder. The lock goes with the process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffcr_compile.durable import disk_error, disk_errors_in_words
from diffcr_compile.errors import UsageError

LOCK_FILE = ".lock"
LOCK_BYTES = 8  # a process number and a line break
# What a system answers where somebody else has the lock; all else is a disk that cannot do it.
_TAKEN = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


def take_lock(folder: Path) -> IO[str]:
    """Lock a folder for this process until the file that is returned is closed.

    The file stays behind and says nothing by being there: the system forgets the lock with the process,
    so that no run has to be cleaned up after.

    Raises:
        UsageError: another run is at work in it.
        ResourceError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise disk_error(error, folder, LOCK_BYTES) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(lock)
        lock.close()
        if error.errno not in _TAKEN:
            raise disk_error(error, folder) from error
        raise UsageError(
            f"another diffcr run is at work in {folder}{holder}; wait for it or name another folder",
            code="DCR-U017",
        ) from None
    # The name of the holder is a help, not the lock. Past the buffer, which would be written once more at the end.
    with contextlib.suppress(OSError):
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"{os.getpid()}\n".encode())
    return lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder while the context lasts, and disk errors are said in words."""
    with disk_errors_in_words(folder), take_lock(folder):
        yield


def _holder(lock: IO[str]) -> str:
    """Which process has the lock, if it could say so."""
    with contextlib.suppress(OSError, ValueError):
        lock.seek(0)
        return f" (process {int(lock.read(20))})"
    return ""
