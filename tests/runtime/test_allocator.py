"""Freed memory goes back to the system while models run."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Whether most of 200 MB in tensors of 1 MB is mapped by itself. A threshold that has grown keeps them together.
SCRIPT = """
import contextlib, ctypes, sys
import torch
from hf_locstitch.runtime.allocator import freed_memory_goes_back

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.empty(16_000_000, dtype=torch.uint8)  # freed at once: glibc's threshold rises to its size
with freed_memory_goes_back() if "inside" in sys.argv else contextlib.nullcontext():
    if "after" in sys.argv:
        with freed_memory_goes_back():
            pass
    before = libc.mallinfo2().hblkhd
    tensors = [torch.empty(1_000_000, dtype=torch.uint8) for _ in range(200)]
    print(libc.mallinfo2().hblkhd - before > 100_000_000)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc is meant"
)
@pytest.mark.parametrize(
    ("where", "mapped"), [("outside", "False"), ("inside", "True"), ("after", "False"), ("inside after", "True")]
)
def test_large_tensors_are_mapped_by_themselves_inside(where: str, mapped: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *where.split()], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mapped
