"""Compiled functions, kept for the next process: where numba is told to, else in the user's cache, which outlives an
installation, else wherever numba finds a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config

from hf_locstitch.runtime.own_cache import private_cache
from hf_locstitch.runtime.version import __version__

Loop = TypeVar("Loop", bound=Callable[..., Any])
T = TypeVar("T")


@numba.njit
def _first() -> None:
    """Two threads that use numba for the first time at once can wait for each other for ever: let it be used for the
    first time while this module is imported, which one thread does."""


def compiled(loop: Loop) -> Loop:
    """At the first call with arguments of each type; the interpreter is left free while it runs."""
    return cast(Loop, kept(lambda cache: numba.njit(loop, nogil=True, cache=cache, error_model="numpy")))


def was_compiled(loop: Callable[..., Any]) -> bool:
    """Whether this process had to compile the loop, for arguments of any types, as no earlier one had kept it."""
    return bool(cast(Any, loop).stats.cache_misses)


def kept(compile: Callable[[bool], T]) -> T:
    """What `compile` makes with numba's cache, or without it where no place can be written to."""
    with _in_own_folder():
        try:
            return compile(True)
        except RuntimeError:
            return compile(False)


@contextmanager
def _in_own_folder() -> Iterator[None]:
    """Numba chooses the place of a function when that is decorated; other programs' functions stay where they are."""
    settings: Any = config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = before or str(_own_folder() or "")
    try:
        yield
    finally:
        settings.CACHE_DIR = before


@cache
def _own_folder() -> Path | None:
    folder = private_cache("loops")
    return None if folder is None else folder / f"{__version__}-numba-{numba.__version__}"
