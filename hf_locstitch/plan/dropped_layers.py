"""Layers for multi-token prediction: bases ship them, training code ignores them, finetunes come without them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import part
from hf_locstitch.plan.recipe import Recipe

BY_NAME = re.compile(r"(?:.*\.)?mtp(?:_\w+)?\.")
BY_NUMBER = re.compile(r".*?\blayers\.(\d+)\.")


def without_dropped_layers(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint]
) -> tuple[Recipe, list[str]]:
    """The recipe, which leaves out such layers where a finetune lacks all of them, and a sentence that says so."""
    if recipe.include or not recipe.method.blocks_only:
        return recipe, []
    globs: dict[str, list[str]] = {}
    for name in base.tensors:
        if (prefix := _predictor(base, name)) is not None:
            globs.setdefault(f"{prefix}*", []).append(name)
    dropped = {
        glob: [model for model, one in finetuned.items() if not any(name in one.tensors for name in names)]
        for glob, names in globs.items()
    }
    left = [glob for glob, models in dropped.items() if models and glob not in recipe.exclude]
    if not left:
        return recipe, []
    models = list(dict.fromkeys(model for glob in left for model in dropped[glob]))
    note = (
        f"{', '.join(models)} {'lacks' if len(models) == 1 else 'lack'} the base's layers for multi-token prediction "
        f"({' '.join(left)}): they stay the base's."
    )
    return recipe.model_copy(update={"exclude": (*recipe.exclude, *left)}), [note]


def _predictor(base: Checkpoint, name: str) -> str | None:
    """What the names of the layer begin with that a tensor belongs to; None if that is a layer of the model itself."""
    if found := BY_NAME.match(name):
        return found[0]
    config = base.config if "num_hidden_layers" in base.config else part(base.config, "text_config")
    count = config.get("num_hidden_layers")
    if config.get("num_nextn_predict_layers") and isinstance(count, int) and (layer := BY_NUMBER.match(name)):
        return layer[0] if int(layer[1]) >= count else None
    return None
