"""Work for a visitor, done by a process of its own: started, followed, stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from hf_locstitch.errors import LocstitchError, WorkError
from hf_locstitch.ui.visitor import PASSING, Visitor, worker_environment

GRACE = 40.0  # seconds from asking a worker to stop until it is ended
LAST = ("result", "error", "stopped")  # events that nothing follows
Event = dict[str, Any]


class Call:
    """One piece of work. The token goes through a pipe to the worker, and nowhere else."""

    def __init__(self, asked: Mapping[str, Any], visitor: Visitor, work: Path) -> None:
        nothing = work / "nothing"  # an empty folder: no name of a repo is that of a folder here
        nothing.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_locstitch.ui.worker"],
            env={
                **worker_environment(os.environ, visitor, work),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            cwd=nothing,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**asked, "token": visitor.token}) + "\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def events(self) -> Iterator[Event]:
        """What the worker tells, as it tells it; at last `died` if it ended without a last word."""
        assert self._process.stdout is not None
        last = None
        for text in self._process.stdout:
            if not text.endswith("\n"):  # it was killed while it told this
                break
            last = json.loads(text)
            yield last
        status = self._process.wait()
        self._close()
        if last is None or last["event"] not in LAST:
            yield {"event": "died", "status": status}

    def stop(self) -> None:
        """Ask the worker to stop; it is ended if it does not."""
        self._close()
        if self._process.poll() is None:
            end = threading.Timer(GRACE, self._end)
            end.daemon = True
            end.start()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()


def answer(asked: Mapping[str, Any], visitor: Visitor, work: Path, seconds: float) -> Event:
    """The result of a short piece of work. Raises LocstitchError with the worker's own paragraph."""
    *_, last = follow(asked, visitor, work, seconds)
    return last


def follow(asked: Mapping[str, Any], visitor: Visitor, work: Path, seconds: float) -> Iterator[Event]:
    """The events of a short piece of work, which is stopped if nobody listens any more. Raises LocstitchError."""
    forget_looks(work)
    try:
        call = Call({**asked, "passing": not visitor.here}, visitor, work)
    except OSError as error:  # of a full disk, or too many processes
        raise WorkError(f"the work could not be started ({error.strerror}). Try again later.") from error
    late = threading.Timer(seconds, call.stop)
    late.daemon = True
    late.start()
    try:
        for event in call.events():
            if event["event"] == "error":
                raise LocstitchError(event["text"])
            if event["event"] == "died":
                raise WorkError(
                    f"the process ended early (status {event['status']}): it may have run out of memory. Try again."
                )
            if event["event"] == "stopped":
                raise WorkError(f"there was no answer within {seconds:.0f} seconds. Try again later.")
            yield event
    finally:
        late.cancel()
        call.stop()


def forget_looks(work: Path, runs: Callable[[int], bool] = psutil.pid_exists) -> None:
    """Remove the homes of looks whose process was killed. runs: whether a process, by its number, still does."""
    for home in (work / "homes").glob(f"{PASSING}*"):
        number = home.name.removeprefix(PASSING).partition("-")[0]
        if not (number.isdecimal() and runs(int(number))):
            shutil.rmtree(home, ignore_errors=True)
