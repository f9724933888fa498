"""Files that have their name only when they are whole, and are on the disk then."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkray.errors import UnavailableError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write `path` under. It becomes `path` when the block ends, and is removed where it fails.

    What is written must have been synced by the block.

    Raises:
        UnavailableError: the disk filled up.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as failure:
        temporary.unlink(missing_ok=True)
        if failure.errno in _FULL:
            raise UnavailableError(
                f"the disk of {path.parent} filled up while {path.name} was being written.",
                hint="Free space and run the same command again: finished files are kept.",
            ) from failure
        raise
    fsync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name, fsync it, and rename it into place.

    Raises:
        UnavailableError: the disk filled up.
    """
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
