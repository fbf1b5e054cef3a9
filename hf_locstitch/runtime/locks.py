"""A lock on a file that ends with its process."""

from __future__ import annotations

import errno
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOG = logging.getLogger("hf_locstitch")
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have no locks


def try_lock(path: Path) -> BaseFileLock | None:
    """Lock a file, which is created. Returns the lock, to be released, or None if another process holds it.

    Not every file system has locks (Lustre, some NFS and FUSE): there filelock does with a marker, or a warning stands
    for the lock. Raises OSError.
    """
    lock = FileLock(path, timeout=0, mode=0o600, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in UNLOCKABLE:
            raise
        LOG.warning(
            f"the file system of {path.parent} cannot lock files: see that no other process works there meanwhile."
        )
    return lock


def remove_locked(folder: Path, lock: BaseFileLock) -> None:
    """Remove as much of a folder as can be removed, and release its lock, on a file in it."""
    shutil.rmtree(folder, ignore_errors=True)
    file = Path(lock.lock_file)
    left = file.exists()  # Windows removes no file that is open
    lock.release()
    if left:
        with suppress(OSError):  # another process has locked it meanwhile
            file.unlink()
            folder.rmdir()
