"""Files that are there whole or not at all, also after a kill, a full disk or a power cut.

Written under another name, forced to the disk, renamed, and the rename forced to the disk. Whatever the
system answers on the way is said in words. Standard library only: this file goes on the device with the
runtime.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcr_compile.errors import ResourceError

# Leftovers of an interrupted write: never listed, never read, so they do no harm.
PARTIAL_SUFFIX = ".partial"
# What a disk or a mount answers; any other error of the system is somebody's mistake.
DISK_ERRORS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
        errno.ESTALE, errno.EMFILE, errno.ENFILE,
    }
)  # fmt: skip
KEPT = "What was finished before is unchanged"


@contextlib.contextmanager
def published(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there gets the name when the context ends well.

    Args:
        path: the file; its folder is made if it does not exist.
        needed: its size in bytes where that is known: refused before the first byte if it cannot fit.

    Raises:
        ResourceError: the disk is full or cannot be written; an older file at `path` is then unchanged.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed is not None and needed > free_bytes(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        temporary = _unfinished(path.parent, f"{path.name}.")
        yield temporary
        _force(temporary)
        temporary.chmod(0o644)  # mkstemp lets nobody else read
        temporary.replace(path)
        force_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise disk_error(error, path, needed) from error
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers find the old one or the new one, never a part.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    with published(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_json_atomic(path: Path, data: Any) -> None:
    """Write JSON atomically. NaN and infinity, which are not JSON, are refused."""
    atomic_write_bytes(path, json.dumps(data, indent=1, allow_nan=False).encode() + b"\n")


@contextlib.contextmanager
def passing_file(folder: Path, prefix: str, data: bytes) -> Iterator[Path]:
    """A file that is gone when the context ends; after a kill it is a leftover like any other.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    path: Path | None = None
    try:
        try:
            path = _unfinished(folder, prefix)
            path.write_bytes(data)
        except OSError as error:
            raise disk_error(error, path or folder, len(data)) from error
        yield path
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()


def force_folder(folder: Path) -> None:
    """Force names that were made, renamed or removed in a folder to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes left below a folder; nobody may be writing there."""
    for path in sorted(folder.rglob(f"*{PARTIAL_SUFFIX}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds a path, or would."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def disk_errors_in_words(folder: Path) -> Iterator[None]:
    """Turn what a disk or a mount answers into one error that says what to do.

    Args:
        folder: where the work is done, for the message where the system names no file.

    Raises:
        ResourceError: the disk is full, may not be written, or cannot be read.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_error(error):
            raise
        raise disk_error(error, folder) from error


def is_disk_error(error: OSError) -> bool:
    """Whether a disk or a mount is to blame, not a wrong name."""
    return error.errno in DISK_ERRORS


def disk_error(error: OSError, path: Path, needed: int | None = None) -> ResourceError:
    """The error in words: what failed where, needed and free bytes, what to do.

    Args:
        error: what the system answered.
        path: what was to be read or written, where the error does not name it.
        needed: bytes that were to be written, where that is known.
    """
    named = error.filename if isinstance(error.filename, (str, os.PathLike)) else path
    with contextlib.suppress(OSError):  # a folder that cannot be looked at has no figures
        wanted = "" if needed is None else f"needed {_size(needed)}, "
        free = f" ({wanted}free {_size(free_bytes(path))})"
        return ResourceError(_sentence(error, os.fspath(named), free), code="DCR-R001")
    return ResourceError(_sentence(error, os.fspath(named), ""), code="DCR-R001")


def _sentence(error: OSError, named: str, figures: str) -> str:
    why = error.strerror or str(error)
    return (
        f"{named} cannot be read or written: {why}{figures}. {KEPT}. Free some space, make the folder "
        "writable or name another one, and run the same command again: it goes on where it stopped."
    )


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _unfinished(folder: Path, prefix: str) -> Path:
    """A new, empty file that is taken for a leftover until it gets another name."""
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=PARTIAL_SUFFIX, dir=folder)
    os.close(handle)
    return Path(name)


def _force(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
