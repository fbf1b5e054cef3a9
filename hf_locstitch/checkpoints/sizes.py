"""Sizes of a model, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_locstitch.checkpoints.config import part

LARGEST = 2**40  # of any size; more is nonsense
WIDTH = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
MLP = ("moe_intermediate_size", "intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim")


def find_size(config: Mapping[str, Any], *names: str, within: Sequence[str] = ("text_config", "vision_config")) -> int:
    """The first of these names found in a part of the config, or in the config itself; 0 if none is."""
    parts = [*(part(config, name) for name in within), config]
    values = (one.get(name) for name in names for one in parts)
    return next((value for value in values if type(value) is int and 0 < value <= LARGEST), 0)


def find_patches(config: Mapping[str, Any]) -> int:
    """Tokens of an image: its patches and the class token; 0 if the config describes no images."""
    image, patch = (find_size(config, name, within=["vision_config"]) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 + 1 if image and patch else 0
