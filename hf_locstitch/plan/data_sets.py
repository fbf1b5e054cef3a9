"""The examples of a plan, opened, each for the finetune that will run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.errors import RecipeError
from hf_locstitch.tasks.choosing_objectives import of_inputs, suggest
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.positions import within_positions
from hf_locstitch.tasks.sets import LocalizationSet, OpenSet, open_set


def open_sets(
    asked: Mapping[str, LocalizationSet],
    finetuned: Mapping[str, Checkpoint],
    base: Checkpoint,
    *,
    unlabelled: bool = False,
) -> dict[str, OpenSet]:
    """asked: by finetune. unlabelled: whether inputs alone are wanted. Raises RequestError."""
    return {name: _readable(open_set(one), finetuned[name], base, unlabelled) for name, one in asked.items()}


def _readable(found: OpenSet, finetuned: Checkpoint, base: Checkpoint, unlabelled: bool) -> OpenSet:
    """The set, with shorter texts where the model has positions for no more. Raises RecipeError."""
    try:
        objective = _objective(found.asked.objective, finetuned, unlabelled)
    except RecipeError:  # who cannot do without says so
        return found
    model = base if objective.base_config else finetuned
    fitting = within_positions(objective, model.config, model.label)
    if fitting is objective:
        return found
    return replace(found, asked=found.asked.model_copy(update={"objective": fitting}))


def _objective(asked: Objective | None, finetuned: Checkpoint, unlabelled: bool) -> Objective:
    if unlabelled:
        return of_inputs(asked, finetuned.config, finetuned.label)
    return asked or suggest(finetuned.config, finetuned.label)
