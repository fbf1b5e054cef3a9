"""JSON and YAML that strangers wrote: parsed within bounds of size and depth, and of what aliases expand to.

Whatever is wrong with a text is a ValueError: never a RecursionError, nor minutes of work.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

JSON_BYTES = 50_000_000  # the index of a model of a trillion parameters takes 15 MB
YAML_BYTES = 1_000_000
YAML_NODES = 100_000  # of a document once its aliases are expanded
DEEPEST = 64  # lists and mappings inside one another; config.json nests five at most
_TOO_DEEP = f"it nests lists or mappings more than {DEEPEST} deep"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, *, largest: int = JSON_BYTES, **hooks: Any) -> Any:
    """A JSON document in UTF-8. hooks: of json.loads. Raises ValueError."""
    if len(content) > largest:
        raise ValueError(f"it has {len(content):,} bytes, more than the {largest:,} that are read")
    text = content.decode("utf-8")
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False, default=str).encode()  # half a surrogate pair is no character
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    depth = 0
    while level := [
        part
        for whole in level
        if isinstance(whole, dict | list)
        for part in (whole.values() if isinstance(whole, dict) else whole)
        if isinstance(part, dict | list)
    ]:
        depth += 1
        if depth >= DEEPEST:
            raise ValueError(_TOO_DEEP)


def front_matter(text: str) -> str:
    """The YAML between two lines of three dashes at the head of a Markdown page; empty if there is none."""
    first, *lines = re.split(r"\r\n|\r|\n", text.lstrip())
    return "\n".join(lines[: lines.index("---")]) if first == "---" and "---" in lines else ""


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values. Raises ValueError."""
    if len(text) > YAML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than the {YAML_BYTES:,} that are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(_yaml_fault(error)) from error
    except (TypeError, AttributeError, LookupError, OverflowError) as error:  # PyYAML on `!!int []` or `? {}`
        raise ValueError(f"a value is not of the type that its tag or form says ({error})") from error


def _yaml_fault(error: yaml.YAMLError) -> str:
    """What and where, without the excerpt, which is of several lines."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"


def _check_nodes(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes below and including this one, each alias counted as all that it stands for. known: those counted."""
    if depth > DEEPEST:
        raise ValueError(_TOO_DEEP)
    if id(node) not in known:
        known[id(node)] = YAML_NODES  # an alias of itself stands for endlessly many
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        children = parts if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_check_nodes(child, known, depth + 1) for child in children)
    if known[id(node)] >= YAML_NODES:
        raise ValueError(f"its aliases stand for more than {YAML_NODES:,} values")
    return known[id(node)]
