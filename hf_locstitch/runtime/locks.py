"""A lock on a file that ends with its process, on file systems that know one kind of lock, another, or none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

LOG = logging.getLogger("hf_locstitch")
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def try_lock(path: Path) -> int | None:
    """Lock a file, which is created. Returns a descriptor to close, or None if another process holds the lock.

    Not every file system has flock (Lustre, some NFS and FUSE): then fcntl's lock is tried, and without that a warning
    stands for the lock.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            if error.errno in HELD:
                os.close(handle)
                return None
    LOG.warning(f"the file system of {path.parent} cannot lock files: see that no other process works there meanwhile.")
    return handle
