"""Freed memory goes back to the system while models run."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
import torch
from hf_locstitch.allocator import freed_memory_goes_back

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def mapped_by_themselves():
    '''Most of 200 MB; a few find room in what was freed before.'''
    before = libc.mallinfo2().hblkhd
    tensors = [torch.empty(1_000_000, dtype=torch.uint8) for _ in range(200)]
    return libc.mallinfo2().hblkhd - before > sum(tensor.nbytes for tensor in tensors) / 2

torch.empty(16_000_000, dtype=torch.uint8)  # freed at once: glibc's threshold rises to its size
print(mapped_by_themselves())
with freed_memory_goes_back():
    print(mapped_by_themselves())
print(mapped_by_themselves())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc is meant"
)
def test_large_tensors_are_mapped_by_themselves_inside() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
