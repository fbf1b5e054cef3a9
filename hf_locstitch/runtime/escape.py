"""Text of strangers (names of tensors, models, data sets, licences, notes), escaped for the place where it goes.

Applied where text is written, never where it comes from. Files of YAML and JSON are written by libraries, which escape.
"""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import quote

from markupsafe import Markup

KEPT = "\u00a0"  # a space that does not break a line is not printable to Python, but harmless
MARKS = re.compile(r"([\\`*\[\]|~$])")
ENTITY = re.compile(r"&(?=#?\w+;)")
EDGE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word an underscore is no emphasis
LINK = re.compile(r"(://|(?<=www)\.)", re.IGNORECASE)  # what GitHub's Markdown makes a link of by itself
BLOCK = re.compile(r"^(\s*)(\d+(?=[.)](\s|$))|(?=[#=-]|\+\s))")  # begins a heading, a list or a rule
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str) -> str:
    """Control characters, escape sequences and marks that turn the direction of writing, as `\\x1b`."""
    return "".join(c if c.isprintable() or c in KEPT else _code(c) for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def line(text: object) -> str:
    """One line of a terminal."""
    return visible(" ".join(re.split(r"[\r\n]+", str(text))))


def terminal(text: str) -> str:
    """Lines of a terminal."""
    return "\n".join(map(visible, text.split("\n")))


def in_json(value: object) -> str:
    """JSON for a terminal: ASCII, and no control characters."""
    return json.dumps(value, indent=2).replace("\x7f", r"\u007f")


def markdown(text: object) -> Markup:
    """Text in a paragraph, list or table of a Markdown page: no heading, emphasis, HTML, link, image or formula."""
    if isinstance(text, Markup):
        return text
    plain = EDGE.sub(r"\_", MARKS.sub(r"\\\1", line(text)))
    plain = BLOCK.sub(r"\1\2\\", LINK.sub(lambda match: "\\" + match[0], plain))
    return Markup(ENTITY.sub("&amp;", plain).replace("<", "&lt;").replace(">", "&gt;"))


def link(text: object, url: str) -> Markup:
    """A link in a Markdown page."""
    return Markup(f"[{markdown(text)}]({quote(url, safe='/:')})")


def code(text: object) -> Markup:
    """A piece of code inside a paragraph or table of a Markdown page."""
    plain = line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return Markup(f"{fence}{space}{plain}{space}{fence}")


def fenced(text: str, language: str) -> Markup:
    """A block of code on a Markdown page, which nothing inside it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{terminal(text.rstrip())}\n{fence}")


def shell(text: object) -> Markup:
    """A word of a shell command inside a fenced block."""
    return Markup(shlex.quote(line(text)))


def python(text: object) -> Markup:
    """A string of a Python program inside a fenced block."""
    return Markup(json.dumps(str(text), ensure_ascii=False) if str(text).isprintable() else json.dumps(str(text)))


def cell(text: str) -> str:
    """A cell of a CSV table that spreadsheets show and do not compute."""
    return f"'{text}" if text.startswith(FORMULA) else text


def figure(text: str) -> str:
    """A text in a figure: matplotlib takes what stands between two dollars for mathematics."""
    return line(text).replace("$", r"\$")
