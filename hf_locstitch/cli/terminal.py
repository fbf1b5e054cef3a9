"""Text as a terminal shows it: lines folded under their labels, a few words in colour; elsewhere as it is."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from typing import TextIO

LABEL = re.compile(r"(?P<label>[^\W\d_][\w-]{0,9}) {1,10}(?=\S)(?<=^.{11})")  # in front of column 12
PREFIX = re.compile(r"hf-locstitch: (?P<label>error|warning|info):")
INDENT = 11
COPIED = ("next",)  # labels of lines that people copy, which are left whole
STYLES = {"error": "bold red", "warning": "yellow", "anomaly": "yellow", "next": "green", "hint": "green"}
OTHERS = "cyan"  # the style of other labels


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal; None if this is none, and nothing is to be folded."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def rendered(text: str, stream: TextIO) -> str:
    """The text for this stream: unchanged unless it is a terminal, in colour unless NO_COLOR is set."""
    width = width_of(stream)
    if width is None:
        return text
    text = "\n".join(folded(line, width) for line in text.split("\n"))
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return text if plain else coloured(text)


def folded(line: str, width: int) -> str:
    """A line with a label in columns of its own, folded beside it; others stay as they are."""
    match = LABEL.match(line)
    if match is None or match["label"] in COPIED or len(line) <= width or width < 4 * INDENT:
        return line
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    )


def coloured(text: str) -> str:
    """With the labels of its lines in colour, as escape sequences of a terminal."""
    import io

    from rich.console import Console
    from rich.text import Text

    marked = Text(text)
    start = 0
    for line in text.split("\n"):
        if match := PREFIX.match(line) or LABEL.match(line):
            marked.stylize(STYLES.get(match["label"], OTHERS), start + match.start("label"), start + match.end("label"))
        start += len(line) + 1
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    console.print(marked, soft_wrap=True, end="")
    return screen.getvalue()
