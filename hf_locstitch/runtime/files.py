"""Files on this machine: text, links, atomic writes, syncing."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE

HARD_LINKS = os.name == "nt"  # elsewhere one more link to a file would look like a change of that file


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest of the folders above it that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself if it does not exist."""
    there = existing_part(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def write_text(path: Path, content: str) -> None:
    """In UTF-8, with the line ends as they are: the same bytes on every system."""
    path.write_text(content, encoding="utf-8", newline="\n")


def link(path: Path, target: Path | str) -> None:
    """Make `path` a symbolic link; where that is not allowed, a copy, or on Windows, by default so, a hard link.

    target: absolute, or from the folder of `path` on. Raises OSError, FileExistsError if something is there.
    """
    file = path.parent / target
    for make in (lambda: path.symlink_to(target), lambda: os.link(file.resolve(), path))[: 1 + HARD_LINKS]:
        try:
            return make()
        except FileExistsError:
            raise
        except OSError:
            continue
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # nobody sees half a copy
        shutil.copyfile(file, copy := Path(folder, path.name))
        copy.rename(path)


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
        write_text(new, content)
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


def forget_locals(error: BaseException | None) -> None:
    """Where a file that is open cannot be deleted, drop the variables of all calls that have ended in an error, which
    else live as long as it: views of mapped files are among them."""
    while error is not None and not OPEN_FILES_MOVE:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted there, also a folder of the same one, as in a container."""
    place = path.resolve()
    if os.path.ismount(place):
        return True
    import psutil

    return str(place) in {mount.mountpoint for mount in psutil.disk_partitions(all=True)}
