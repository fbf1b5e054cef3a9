"""What the program prints, in one process of several."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

from hf_locstitch.cli.terminal import rendered
from hf_locstitch.runtime.escape import in_json, line, terminal

PROGRAM = "hf-locstitch"

READ_NO_MORE = (errno.EPIPE, errno.EINVAL)  # of a pipe; the latter is Windows'


def speaks() -> bool:
    """Whether this process prints: under a launcher only the first does."""
    return os.environ.get("RANK", "0") == "0"


class LogToStderr(logging.Handler):
    """Print what the package logs, such as warnings, in the same form as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if speaks():
            tell(f"{PROGRAM}: {record.levelname.lower()}: {line(record.getMessage())}")


def tell(text: str) -> None:
    """For people, on standard error; above progress bars, if there are some."""
    text = rendered(text, sys.stderr)
    if (bars := sys.modules.get("tqdm")) is not None and sys.stderr.isatty():
        bars.tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


def accept_any_encoding() -> None:
    """What a stream cannot show in its encoding, such as a Windows console's, is written as an escape: \\u03c4."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def put(text: str) -> None:
    """For people, on standard output."""
    put_unchanged(rendered(text, sys.stdout))


def put_unchanged(text: str) -> None:
    """On standard output; a reader that has seen enough of it is no error."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in READ_NO_MORE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends


def put_json(value: dict[str, Any]) -> None:
    """One object on standard output."""
    put(in_json(value))


def fail(message: str, status: int) -> int:
    """Tell an error; returns the exit status."""
    if speaks():
        tell(f"{PROGRAM}: error: {terminal(message)}")
    return status


class Result(Protocol):
    def as_json(self) -> dict[str, Any]: ...


class Plan(Result, Protocol):
    def describe(self) -> str: ...


def announcing(plan: Callable[[], str], quiet: bool) -> Callable[[], object]:
    """What tells a plan once all is checked, before the work. plan: as text."""
    return (lambda: None) if quiet else (lambda: tell(plan()))


def put_result(result: Result, as_json: bool, *parts: str) -> None:
    """As JSON on standard output, or these parts of a text for people on standard error."""
    if as_json:
        put_json(result.as_json())
    else:
        tell("\n".join(parts))


def put_plan(plan: Plan, as_json: bool) -> None:
    """What --dry-run prints."""
    put_json(plan.as_json()) if as_json else put(plan.describe())
