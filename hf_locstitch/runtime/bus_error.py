"""A word before the end when a mapped file is cut short by another program.

Reading beyond the new end raises SIGBUS, which ends the process in silence. No Python code can run then: the handler
is machine code that writes a message and leaves.
"""

from __future__ import annotations

import ctypes
import signal
from functools import cache

import numba
import numpy as np
from numba import types

from hf_locstitch.runtime.compiling import kept

MESSAGE = np.frombuffer(
    b"hf-locstitch: error: a file was cut short by another program while it was read (SIGBUS). Nothing was written to "
    b"the output. Check that the inputs are whole and that nothing writes there, then run the same command again.\n",
    dtype=np.uint8,
)
HANDLER = types.void(types.int32)
_write = types.ExternalFunction("write", types.intp(types.int32, types.uintp, types.uintp))
_exit = types.ExternalFunction("_exit", types.void(types.int32))


def _on_bus_error(number: int) -> None:
    _write(2, MESSAGE.ctypes.data, MESSAGE.size)
    _exit(1)


@cache
def explain_bus_errors() -> None:
    """From now on in this process, unless something handles them already."""
    if not hasattr(signal, "SIGBUS"):
        return
    handler = kept(lambda cache: numba.cfunc(HANDLER, cache=cache)(_on_bus_error))
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    if before := install(signal.SIGBUS, handler.address):
        install(signal.SIGBUS, before)
