"""Docstrings as griffe reads them: `Example:` is a section of code, and a list of arguments may go over two lines."""

from __future__ import annotations

import re
from typing import Any

import griffe

JOINED = re.compile(r",\n {8,}(?=\w+(?:, \w+)*: )")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            obj.docstring.value = JOINED.sub(", ", text)
