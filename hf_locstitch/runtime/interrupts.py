"""Signals that ask a process to stop: all of them are raised as Ctrl-C is, so that all are cleaned up after alike."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

WATCHER = "hf-locstitch deadline"  # the thread that ends it
GRACE = 30.0  # seconds from a signal to the end of the process

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


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
def raising_interrupts(give_up: Callable[[int], object]) -> Iterator[None]:
    """SIGTERM, SIGHUP and Windows' SIGBREAK raise Interrupted, as Ctrl-C raises KeyboardInterrupt; one that is ignored
    is left so.

    give_up: called with the signal's number, in a thread, before the process is ended because it still runs GRACE
    seconds after the signal: a library may swallow the exception, or be long in code that is not Python's. Ending
    it like this loses nothing, for what a killed process leaves is what the next run continues from.
    """

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
        with _deadline({*caught, signal.SIGINT}, give_up):
            yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _deadline(numbers: set[int], give_up: Callable[[int], object]) -> Iterator[None]:
    """End the process if the block still runs GRACE seconds after one of these signals."""
    left = threading.Event()
    heard, tell = socket.socketpair()  # not a pipe, which Windows does not take for this
    tell.setblocking(False)

    def watch() -> None:
        with heard:
            while number := heard.recv(1):
                if number[0] in numbers and not left.wait(GRACE):
                    give_up(number[0])
                    os._exit(128 + number[0])

    watcher = threading.Thread(target=watch, name=WATCHER, daemon=True)
    watcher.start()
    # Told even while Python's handlers cannot run.
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        tell.close()
        watcher.join()
