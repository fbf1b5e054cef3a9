"""What the program prints, in one process of several."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any, Protocol

from hf_locstitch.runtime.escape import in_json, line


def speaks() -> bool:
    """Whether this process prints: under a launcher only the first does."""
    return os.environ.get("RANK", "0") == "0"


class LogToStderr(logging.Handler):
    """Print what the package logs, such as warnings, in the same form as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if speaks():
            print(f"hf-locstitch: {record.levelname.lower()}: {line(record.getMessage())}", file=sys.stderr)


def put(text: str) -> None:
    """On standard output, in whatever encoding it has; a reader that has seen enough of it is no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends


class Result(Protocol):
    def as_json(self) -> dict[str, Any]: ...

    def describe(self) -> str: ...


def put_result(result: Result, as_json: bool) -> None:
    """As JSON on standard output, or for people on standard error."""
    if as_json:
        put(in_json(result.as_json()))
    else:
        print(result.describe(), file=sys.stderr)


def put_plan(plan: Result, as_json: bool) -> None:
    """What --dry-run prints."""
    put(in_json(plan.as_json()) if as_json else plan.describe())
