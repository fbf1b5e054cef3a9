"""Sizes of a model, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer")
MLP = ("moe_intermediate_size", "intermediate_size", "n_inner")


def find_size(config: Mapping[str, Any], *names: str, within: Sequence[str] = ("text_config", "vision_config")) -> int:
    """The first of these names found in a part of the config, or in the config itself; 0 if none is."""
    parts = [*(config.get(part) or {} for part in within), config]
    values = (part.get(name) for name in names for part in parts)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def find_patches(config: Mapping[str, Any]) -> int:
    """Tokens of an image: its patches and the class token; 0 if the config describes no images."""
    image, patch = (find_size(config, name, within=["vision_config"]) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 + 1 if image and patch else 0
