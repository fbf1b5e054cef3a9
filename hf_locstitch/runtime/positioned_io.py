"""Bytes at places of an open file, which many threads read and write at once, and the space that it takes on the disk.

Where the system reads and writes at an offset (Linux, macOS), a call of it is one system call. Elsewhere (Windows) a
lock is held while the file is moved to its place and read or written.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

AT_OFFSETS = hasattr(os, "preadv") and hasattr(os, "pwrite")  # whether the system does it without a shared position
# Whether a file that is open can be renamed and deleted. Systems either have both or, as Windows, neither.
OPEN_FILES_MOVE = AT_OFFSETS
MOST = 1 << 30  # bytes in one call: Linux moves at most 2 GiB, macOS refuses more
_BINARY = getattr(os, "O_BINARY", 0)  # else Windows would change line ends
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


class PositionedFile:
    """An open file, by its descriptor. Threads may call anything but `close` at once.

    Duplicates of a descriptor share its position, so that they must also share this object's lock: see `duplicate`.
    """

    def __init__(self, fd: int, lock: threading.Lock | None = None) -> None:
        """lock: of another object for the same open file."""
        self._fd, self._lock = fd, lock or threading.Lock()

    @classmethod
    def open(cls, path: Path, *, truncate: bool = False, create: bool = True, mode: int = 0o600) -> PositionedFile:
        """For reading and writing. Raises OSError. mode: the permissions of a new file."""
        flags = os.O_RDWR | _BINARY | (os.O_CREAT if create else 0) | (os.O_TRUNC if truncate else 0)
        return cls(os.open(path, flags, mode))

    def duplicate(self) -> PositionedFile:
        """The same open file; each is closed by itself."""
        return PositionedFile(os.dup(self._fd), self._lock)

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill a buffer with what begins at `offset`. Returns the number of bytes, fewer only where the file ends."""
        view, done = memoryview(buffer), 0
        while done < len(view) and (count := self._read(view[done : done + MOST], offset + done)):
            done += count
        return done

    def read(self, count: int, offset: int) -> bytearray:
        """`count` bytes from `offset` on, fewer only where the file ends."""
        content = bytearray(count)
        del content[self.read_into(content, offset) :]
        return content

    def write(self, content: bytes | memoryview, offset: int) -> None:
        """Write all of it at `offset`."""
        view = memoryview(content)
        while view:
            count = self._write(view[:MOST], offset)
            view, offset = view[count:], offset + count

    def _read(self, buffer: memoryview, offset: int) -> int:
        if AT_OFFSETS:
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            content = os.read(self._fd, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _write(self, content: memoryview, offset: int) -> int:
        if AT_OFFSETS:
            return os.pwrite(self._fd, content, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, content)

    def reserve(self, size: int) -> None:
        """Make the file `size` bytes long. Raises OSError if the disk has no room for them, where the system tells."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, size)
        else:
            os.ftruncate(self._fd, size)

    def begin_write_back(self, offset: int, count: int) -> None:
        """Let these bytes go to the disk now, or all is left to `sync`. They will not be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)

    def punch_hole(self, start: int, stop: int) -> bool:
        """Free the space of bytes start … stop, which read as zeros from then on. False where the system cannot."""
        if sys.platform != "linux" or stop <= start:
            return False
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
        how, length = _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(stop - start)
        return fallocate(self._fd, how, ctypes.c_int64(start), length) == 0

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Once and for all: closed again, it leaves alone who has got its number meanwhile."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
