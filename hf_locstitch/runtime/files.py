"""Files on this machine: atomic writes, syncing, punching holes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest of the folders above it that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself if it does not exist."""
    there = existing_part(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` on success: readers see either the old file or the complete new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Text, in UTF-8; it is on the disk before it replaces what was there."""
    with replacing(path) as new:
        new.write_text(content, encoding="utf-8")
        sync_file(new)


def write_all(file: RawIOBase, content: bytes) -> None:
    """Write all of it; one write to a raw file may be partial."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) or 0 :]


def sync_file(path: Path) -> None:
    """Return once everything written to the file is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted there, also a folder of the same one, as in a container."""
    place = path.resolve()
    if os.path.ismount(place):
        return True
    import psutil

    return str(place) in {mount.mountpoint for mount in psutil.disk_partitions(all=True)}


def punch_hole(fd: int, start: int, stop: int) -> bool:
    """Free the space of bytes start … stop, which read as zeros from then on. False where the system cannot."""
    if sys.platform != "linux" or stop <= start:
        return False
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    return fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(stop - start)) == 0
