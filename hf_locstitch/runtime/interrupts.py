"""Signals that ask a process to stop: all of them are raised as Ctrl-C is, so that all are cleaned up after alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """number: of the signal. kept: the folder of unfinished work, if any, from which the next run continues."""

    def __init__(self, number: int = signal.SIGINT, kept: Path | None = None) -> None:
        super().__init__()
        self.number, self.kept = number, kept

    @property
    def exit_status(self) -> int:
        return 128 + self.number

    @classmethod
    def of(cls, stop: KeyboardInterrupt, kept: Path | None = None) -> Interrupted:
        """The same, as this class. kept: as above, unless it is known already."""
        if not isinstance(stop, cls):
            return cls(kept=kept)
        return cls(stop.number, stop.kept or kept)


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Interrupted, as Ctrl-C raises KeyboardInterrupt; one that is ignored is left so."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # only that one can receive signals
        yield
        return
    caught = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
