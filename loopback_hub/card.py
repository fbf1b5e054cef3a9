"""The metadata block of a repository's README.md, checked the way the Hub checks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import yaml

_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")

Check = Callable[[object], bool]


class CardError(ValueError):
    """The block is not YAML, or not a mapping."""


def metadata(readme: str) -> dict[str, object] | None:
    """The mapping at the top of a README.md; None if there is none. Raises CardError."""
    block = _BLOCK.match(readme)
    if block is None:
        return None
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise CardError(f"YAML metadata cannot be read: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise CardError(f"YAML metadata must be a mapping, not {type(data).__name__}")
    return data


def problems(readme: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings that the Hub has about a README.md."""
    try:
        data = metadata(readme)
    except CardError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    rules = {**_COMMON, **(_MODEL if repo_type == "model" else _DATASET)}
    wrong = [
        f'"{key}" must be {wanted}, not {data[key]!r}'
        for key, (wanted, check) in rules.items()
        if data.get(key) is not None and not check(data[key])
    ]
    return wrong, []


def tags(data: Mapping[str, object]) -> list[str]:
    """Tags that the Hub derives from a card's metadata."""
    derived = [str(tag) for tag in _listed(data.get("tags"))]
    for key in ("license", "base_model"):
        derived += [f"{key}:{value}" for value in _listed(data.get(key))]
    relation = data.get("base_model_relation")
    if relation:
        derived += [f"base_model:{relation}:{value}" for value in _listed(data.get("base_model"))]
    return derived


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(_text(item) for item in value)


def _text_or_texts(value: object) -> bool:
    return _text(value) or _texts(value)


def _repo_ids(value: object) -> bool:
    return _text_or_texts(value) and all(_REPO_ID.fullmatch(str(item)) for item in _listed(value))


def _model_index(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and _text(item.get("name")) and isinstance(item.get("results"), list) for item in value
    )


def _configs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and _text(item.get("config_name")) for item in value)


_COMMON: dict[str, tuple[str, Check]] = {
    "license": ("a string or a list of strings", _text_or_texts),
    "language": ("a string or a list of strings", _text_or_texts),
    "tags": ("a list of strings", _texts),
    "pretty_name": ("a string", _text),
}
_MODEL: dict[str, tuple[str, Check]] = {
    "base_model": ("a repository or a list of repositories", _repo_ids),
    "base_model_relation": (f"one of {', '.join(_RELATIONS)}", lambda value: value in _RELATIONS),
    "datasets": ("a repository or a list of repositories", _repo_ids),
    "library_name": ("a string", _text),
    "metrics": ("a string or a list of strings", _text_or_texts),
    "model-index": ("a list of mappings with name and results", _model_index),
    "new_version": ("a repository", lambda value: _text(value) and _repo_ids(value)),
    "pipeline_tag": ("a string", _text),
}
_DATASET: dict[str, tuple[str, Check]] = {
    "configs": ("a list of mappings with config_name", _configs),
    "size_categories": ("a string or a list of strings", _text_or_texts),
    "source_datasets": ("a string or a list of strings", _text_or_texts),
    "task_categories": ("a string or a list of strings", _text_or_texts),
}
