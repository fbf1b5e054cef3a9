"""How the C library handles freed memory."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of mallopt, in glibc's malloc.h
LARGE = 1 << 19  # bytes: larger blocks are mapped separately, and returned to the system when freed
GROWN = 32 << 20  # bytes: the maximum that glibc's own dynamic threshold grows to

_CHANGING = threading.Lock()
_INSIDE: list[bool] = []  # an entry for each of the contexts below that are open


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
    """Within this context, and once at its end, freed tensors are returned to the system. Only glibc needs it.

    Passes through models run in many threads; glibc gives these their own arenas, which return little memory:
    measured, a refit held 1.4 GB while using 0.3. The number of arenas stays at one afterwards. And where models are
    built, weights that nobody fills would stretch the heap, which then fills up with holes: measured, a merge of three
    adapters held 1.0 GB, with 0.2 in use, and 0.75 if the models are built in this context.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", None)
    if library is None or mallopt is None:
        yield
        return
    with _CHANGING:
        _INSIDE.append(True)
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(ARENA_MAX, 1)
    try:
        yield
    finally:
        with _CHANGING:
            _INSIDE.pop()
            if not _INSIDE:
                mallopt(MMAP_THRESHOLD, GROWN)
                mallopt(TRIM_THRESHOLD, 2 * GROWN)  # as glibc's own threshold would have grown, too
            library.malloc_trim(0)
