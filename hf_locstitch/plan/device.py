"""Where models run: as a command asks for it, in place of what the recipe's parts say."""

from __future__ import annotations

from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.devices import AUTO, CPU

PARTS = ("localizer", "stitch", "method")


def with_device(recipe: Recipe, device: str | None) -> tuple[Recipe, list[str]]:
    """The recipe with this device wherever a part of it runs models or solves, and what is to be said of it.

    device: None leaves all as it is.
    """
    if device is None:
        return recipe, []
    parts = {field: part for field in PARTS if hasattr(part := getattr(recipe, field), "device")}
    if not parts and device not in (AUTO, CPU):
        return recipe, [
            f"--device {device} changes nothing: no model runs here. Masks by magnitude and merges without a fit move "
            "every weight once, which the processors do as fast as it can be read."
        ]
    moved = {field: part.model_copy(update={"device": device}) for field, part in parts.items()}
    return recipe.model_copy(update=moved), []
