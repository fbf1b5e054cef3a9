"""Giving the disk back parts of a file that still has others to come."""

from __future__ import annotations

import ctypes
import sys

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def punch_hole(fd: int, start: int, stop: int) -> bool:
    """Free the space of bytes start … stop, which read as zeros from then on. False where the system cannot."""
    if sys.platform != "linux" or stop <= start:
        return False
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    return fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(stop - start)) == 0
