"""What is read of a config.json, whatever a stranger put there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names of the model's classes; those that are no texts are left out."""
    named = config.get("architectures")
    listed = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return [name for name in listed if isinstance(name, str)]


def architecture(config: Mapping[str, Any]) -> str:
    """The first of them; empty if there is none."""
    return next(iter(architectures(config)), "")


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A config inside the config; empty if there is none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def whole_and_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and those inside it, such as text_config."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Of the model and of those that it consists of, as far as they are stated."""
    return [str(kind) for one in whole_and_parts(config) if (kind := one.get("model_type"))]
