"""Small records of what is done, for a later process: JSON, each with a checksum. A damaged one is as good as none."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_locstitch.runtime.files import write_atomically


def write_record(path: Path, content: Any) -> None:
    """Replace a record; on the disk when this returns. content: as JSON has it."""
    write_atomically(path, _line(content))


def read_record(path: Path) -> Any:
    """What was written; None if it is absent or damaged."""
    return next(iter(read_lines(path)), None)


def append_lines(path: Path, contents: Iterable[Any]) -> None:
    """Add records to a file of many."""
    with path.open("a", encoding="utf-8", newline="\n") as journal:
        journal.writelines(map(_line, contents))


def read_lines(path: Path) -> Iterator[Any]:
    """The whole ones among a file's records; none if it is absent."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return
    for line in lines:
        checksum, _, content = line.partition(" ")
        if checksum == _checksum(content):
            yield json.loads(content)


def _line(content: Any) -> str:
    text = json.dumps(content)
    return f"{_checksum(text)} {text}\n"


def _checksum(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"
