"""Pieces of a Markdown page: templates, parts that are filled in later, pictures."""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from hf_locstitch.runtime.escape import markdown, python, shell

WIDEST, HIGHEST = 720, 220  # pixels of a picture at the top, so that what follows is on the first screen


def template(file: Path) -> jinja2.Template:
    """Of a Markdown page: every value is escaped for it, unless it is marked as Markdown."""
    return page(file.read_text(encoding="utf-8"))


@lru_cache  # compiling one takes longer than all else that a merge of small files writes
def page(text: str) -> jinja2.Template:
    environment = jinja2.Environment(finalize=markdown)
    environment.filters |= {"shell": shell, "python": python}
    return environment.from_string(text)


def has_part(text: str, name: str) -> bool:
    return _part(name).search(text) is not None


def with_part(text: str, name: str, content: str) -> str:
    """The page with this content where the part of that name was or, if it has none, at the end."""
    part = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
    return _part(name).sub(lambda _: part, text) if has_part(text, name) else f"{text.rstrip()}\n\n{part}\n"


def _part(name: str) -> re.Pattern[str]:
    """Its marks begin lines: what strangers named may hold the same inside one."""
    return re.compile(f"^<!-- {name} -->.*?^<!-- /{name} -->", re.DOTALL | re.MULTILINE)


def picture(png: Path, alt: str) -> Markup:
    """The figure in figures/, small enough for the top of a page; narrow screens shrink it."""
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    shown = min(WIDEST, round(HIGHEST * width / height))
    return Markup(f'<img src="figures/{png.name}" width="{shown}" alt="{escape(alt)}">')
