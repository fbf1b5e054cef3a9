"""SHA-256 of files on this machine, remembered in the user's cache: a file that has not changed is hashed once.

A file is known by its real path, device, inode, size, and the times of the last change of its content and of itself.
What was changed shortly before it was hashed is not remembered: it may change again within the same tick of the clock.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from hf_locstitch.runtime.files import replacing
from hf_locstitch.runtime.journal import append_lines, read_record
from hf_locstitch.runtime.own_cache import private_cache

SETTLED = 2_000_000_000  # nanoseconds; the coarsest clock of a file system ticks that often
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileState:
    """path: without links. size: bytes. changed, moved: in nanoseconds, of the content and of the file itself."""

    path: str
    device: int
    inode: int
    size: int
    changed: int
    moved: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Raises OSError."""
        real = path.resolve()
        found = real.stat()
        moved = getattr(found, "st_birthtime_ns", found.st_ctime_ns)  # Windows': a hard link does not change it
        return cls(str(real), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, moved)


def state_of(path: Path) -> FileState | None:
    """None if the file is gone."""
    try:
        return FileState.of(path)
    except OSError:
        return None


def recall(state: FileState) -> str | None:
    """The hash of a file that is still as it was when that was remembered."""
    if (folder := private_cache("hashes")) is None:
        return None
    match read_record(_record(folder, state)):
        case [*known, str(sha256)] if known == [*astuple(state)] and SHA256.fullmatch(sha256):
            return sha256
    return None


def remember(state: FileState, since: int, sha256: str) -> None:
    """state: of the file before it was hashed; since: the time then, nanoseconds. Failing is no harm."""
    if since - max(state.changed, state.moved) < SETTLED or (folder := private_cache("hashes")) is None:
        return
    with suppress(OSError):
        if state_of(Path(state.path)) == state:
            with replacing(_record(folder, state)) as new:
                append_lines(new, [[*astuple(state), sha256]])


def _record(folder: Path, state: FileState) -> Path:
    return folder / hashlib.sha256(state.path.encode(errors="surrogateescape")).hexdigest()[:32]
