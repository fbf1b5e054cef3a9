"""How the C library handles freed memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD, ARENA_MAX = -3, -8  # of mallopt, in glibc's malloc.h
LARGE = 1 << 19  # bytes: larger blocks are mapped separately, and returned to the system when freed
GROWN = 32 << 20  # bytes: the maximum that glibc's own dynamic threshold grows to


def share_one_arena() -> None:
    """Let threads that are yet to start share their memory: what one has freed, another takes. Only glibc needs it.

    Measured on a quarter of a billion parameters: merges of three full finetunes take 133 MB in place of 156, of three
    adapters 958 in place of 1,105, in the same time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(ARENA_MAX, 1)


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Within this context, freed tensors are returned to the system. Only glibc needs it.

    Passes through models run in many threads; glibc gives these their own arenas, which return little memory:
    measured, a refit held 1.4 GB while using 0.3. The number of arenas stays at one afterwards.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGE)
    mallopt(ARENA_MAX, 1)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, GROWN)
