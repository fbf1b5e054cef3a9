"""Work in the background that does not keep the process from ending, which that of a ThreadPoolExecutor does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
Task = tuple["Future[object]", Callable[[], object]]


class DaemonPool:
    """Up to `most` threads, each begun when there is work for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._tasks.put((future, work))  # pyright: ignore[reportArgumentType]
        if len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()
        return future

    def close(self) -> None:
        """Start nothing more; what has not begun is cancelled."""
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
