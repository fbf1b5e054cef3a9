"""HTML of results for notebooks: tables and pictures, every text escaped, no scripts.

Colours are the notebook's own, so that it reads in light and in dark.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from hf_locstitch.runtime.escape import line

LABEL = 11  # columns that a label takes in a summary, as `describe` prints it
WEB = ("https://", "http://")
RULE = "border:0;border-bottom:1px solid rgba(128,128,128,.4);background:none;color:inherit;padding:.25em .8em"
TEXT = "text-align:left;vertical-align:top"
NUMBER = "text-align:right;vertical-align:top;white-space:nowrap"  # and its error
HEAD = "text-align:left;vertical-align:bottom"
ROW = Markup('<tr style="background:none">{}</tr>')


def page(*parts: Markup | None) -> str:
    """What a notebook shows; None is left out."""
    shown = Markup("").join(part for part in parts if part is not None)
    return str(Markup('<div style="overflow-x:auto">{}</div>').format(shown))


def table(rows: Sequence[Sequence[str]], keys: int = 1) -> Markup | None:
    """A table whose first row is the head; nothing if there is no other. keys: columns that say what a row is about."""
    head, *body = rows
    if not body:
        return None
    cells = [ROW.format(_cells(head, keys, "th"))] + [ROW.format(_cells(row, keys, "td")) for row in body]
    return _table(cells)


def summary(text: str) -> Markup:
    """The lines of a `describe`, a label of ten columns and what it says, as a table with one row for each label."""
    by_label = groupby(filter(None, text.split("\n")), key=lambda one: one[:LABEL].strip())
    return _table([_row(label, [one[LABEL:] for one in lines]) for label, lines in by_label])


def picture(png: Path, alt: str) -> Markup | None:
    """The picture itself, on white, as figures are drawn; nothing if it cannot be read."""
    try:
        data = base64.b64encode(png.read_bytes()).decode("ascii")
    except OSError:
        return None
    style = "max-width:100%;max-height:20em;background:white;margin:.5em 0"
    return Markup('<p><img alt="{}" style="{}" src="data:image/png;base64,{}"></p>').format(alt, style, data)


def _row(label: str, said: Sequence[str]) -> Markup:
    lines = map(_linked if label == "published" else _apart, said)
    return ROW.format(_cell("th", TEXT, _apart(label)) + _cell("td", TEXT, Markup("<br>").join(lines)))


def _apart(said: str) -> Markup:
    """Columns inside a line stay apart."""
    return Markup.escape(re.sub(r"(?<=\S) {2,}", "\u2003", line(said)))


def _linked(said: str) -> Markup:
    """`URL at COMMIT`; no other line has addresses of our own."""
    url, _, rest = line(said).partition(" ")
    return Markup('<a href="{0}">{0}</a> {1}').format(url, rest) if url.startswith(WEB) else _apart(said)


def _cells(row: Sequence[str], keys: int, tag: str) -> Markup:
    texts, numbers = (HEAD, HEAD.replace("left", "right")) if tag == "th" else (TEXT, NUMBER)
    cells = (_cell(tag, texts if place < keys else numbers, _apart(text)) for place, text in enumerate(row))
    return Markup("").join(cells)


def _cell(tag: str, style: str, content: Markup) -> Markup:
    return Markup('<{0} style="{1};{2}">{3}</{0}>').format(tag, style, RULE, content)


def _table(rows: Sequence[Markup]) -> Markup:
    style = "border-collapse:collapse;border:0;margin:.5em 0;font-variant-numeric:tabular-nums"
    return Markup('<table style="{}">{}</table>').format(style, Markup("").join(rows))
