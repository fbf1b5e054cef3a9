"""Recipes as YAML files: read before they are validated, and written so that they can be run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_locstitch.artifacts.manifest import RECIPE_FILE
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.runtime.parsing import parse_yaml
from hf_locstitch.stitch.fitting import OnInputs
from hf_locstitch.tasks.sets import LocalizationSet

# Fields that say where it goes and how it is judged.
NOT_THE_MERGE = ("out", "adapter", "push_to", "private", "create_pr", "evaluate", "strict")


def load_recipe(path: Path) -> dict[str, Any]:
    """The fields of a YAML recipe, not yet validated. Raises RecipeError if it is not a mapping."""
    try:
        fields = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} must hold fields such as `base:` and `finetuned:`, not {type(fields).__name__}.")
    return fields


def recipe_of(source: Source) -> Recipe | None:
    """The recipe that lies beside a merge's weights; None if there is none. Raises RecipeError."""
    if RECIPE_FILE not in source.files:
        return None
    return make_recipe(load_recipe(source.fetch(RECIPE_FILE)), where=f"{source.label}/{RECIPE_FILE}")


def check_task_code(fields: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError if a recipe from a file would run the Python of a folder of lm-eval tasks.

    Task files can call any Python of their folder, and recipes come from strangers.
    """
    asked = fields.get("evaluate")
    if isinstance(asked, Mapping) and asked.get("include_path") is not None:
        raise RecipeError(
            f"{where} asks for the task files in {asked['include_path']} (evaluate.include_path), which can run any "
            "Python code. Read them, then allow it with --allow-task-code, or evaluate the merge afterwards: "
            "hf-locstitch evaluate OUT --include-path DIR."
        )


def dump_recipe(recipe: Recipe) -> str:
    """YAML for the same merge: what differs from the defaults, without output targets and evaluation."""
    fields = recipe.model_dump(mode="json", exclude={*NOT_THE_MERGE}, exclude_defaults=True)
    if recipe.localizer is not None:
        fields["localizer"] = recipe.localizer.model_dump(mode="json")
    if recipe.data:
        fields["data"] = _dump_sets(recipe.data)
    if recipe.stitch is not None:
        fields["stitch"] = {**recipe.stitch.as_record(), **_dump_data(recipe.stitch)}
    if isinstance(recipe.method, OnInputs) and recipe.method.data:
        fields["method"] = {"name": recipe.method.name, **fields["method"], **_dump_data(recipe.method)}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _dump_data(fitting: OnInputs) -> dict[str, Any]:
    return {"data": _dump_sets(fitting.data)} if fitting.data else {}


def _dump_sets(sets: Mapping[str, LocalizationSet] | Sequence[LocalizationSet]) -> Any:
    if isinstance(sets, Mapping):
        return {name: asked.dump() for name, asked in sets.items()}
    return [asked.dump() for asked in sets]
