"""State of models that no gradient reaches, such as the biases by which routers balance their experts.

transformers has it in buffers or in parameters that are not trained; on disk it looks like any weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.localizable import localizable
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.human import some

STATE = re.compile(
    r"\.(e_score_correction_bias|expert_bias|balancing_biases|layer_scalar|slope_rate|query_decay|key_decay|"
    r"diagonal_decay)$"
)


def without_untrained_state(recipe: Recipe, base: Checkpoint) -> tuple[Recipe, list[str]]:
    """The recipe, which leaves such tensors out where a localizer uses data, unless it names them itself, and a
    sentence that says so."""
    if recipe.localizer is None or not recipe.localizer.needs_data:
        return recipe, []
    chosen = localizable((info for _, info in base.tensors.values()), recipe.include, recipe.exclude)
    found = [name for name in chosen if STATE.search(name) and name not in recipe.include]
    if not found:
        return recipe, []
    globs = _globs(found, recipe.include)
    note = (
        f"{some(found)}: state that no gradient reaches is not localized by {recipe.localizer.method}, which uses "
        "data. It stays the base's, unless rest_from names a finetune."
    )
    return recipe.model_copy(update={"exclude": (*recipe.exclude, *globs)}), [note]


def _globs(names: Sequence[str], named: Sequence[str]) -> list[str]:
    """For all tensors of each kind; one by one where the recipe itself names some of them."""
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    kinds = [f"*.{ending}" for ending in endings if not any(one.endswith(f".{ending}") for one in named)]
    return [*kinds, *(name for name in names if f"*.{name.rpartition('.')[2]}" not in kinds)]
