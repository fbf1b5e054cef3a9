"""Which objective: as a recipe asks for one, or as a finetune's architecture suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.errors import RecipeError
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.objectives import OBJECTIVES

if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = OBJECTIVES.union("kind")


def suggest(config: Mapping[str, Any], label: str) -> Objective:
    """For a finetune with this config.json. Raises RecipeError if there is no default objective."""
    for objective in OBJECTIVES.all():
        if objective.suits(config):
            return objective()
    named = architecture(config) or "model that names no architecture"
    raise RecipeError(
        f"{label} is a {named}, for which no objective is known. Set the objective of its data in the "
        "recipe: {kind: masked-lm, label_words: [...]}, {kind: clip-zero-shot, classes: [...]} or "
        "{kind: text-zero-shot, classes: [...]}."
    )


def of_inputs(asked: Objective | None, config: Mapping[str, Any], label: str) -> Objective:
    """Of unlabelled inputs: as asked for or suggested; else last hidden states are compared. Raises RecipeError."""
    try:
        return asked or suggest(config, label)
    except RecipeError:
        if "vision_config" in config:
            raise
        return OBJECTIVES.find("features")()
