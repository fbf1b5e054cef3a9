"""Recipes as YAML files: read before they are validated, and written so that they can be run again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_locstitch.artifacts.manifest import RECIPE_FILE
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.mergekit.config import is_mergekit
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.runtime.parsing import parse_yaml
from hf_locstitch.stitch.fitting import OnInputs
from hf_locstitch.tasks.sets import LocalizationSet

LOG = logging.getLogger("hf_locstitch")
# Fields that say where it goes and how it is judged.
NOT_THE_MERGE = ("out", "adapter", "push_to", "private", "create_pr", "evaluate", "compare", "strict")


def load_recipe(path: Path) -> dict[str, Any]:
    """The fields of a YAML recipe, not yet validated, or those that a config of mergekit's stands for, which may also
    say where the merge goes and how it is judged.

    Raises RecipeError if it is neither, and CheckpointError if such a config's base cannot be read.
    """
    fields = _read(path)
    if not is_mergekit(fields):
        return fields
    from hf_locstitch.plan.mergekit.translate import translate  # reads checkpoints

    beside = {key: fields.pop(key) for key in NOT_THE_MERGE if key in fields}
    translation = translate(fields, str(path))
    for note in translation.notes:
        LOG.warning("%s: %s.", path, note)
    return {**translation.fields, **beside}


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(fields, dict):
        given = "but is empty" if fields is None else f"not a {type(fields).__name__}"
        raise RecipeError(f"{path} must hold fields such as `base:` and `finetuned:`, {given}.")
    return fields


def recipe_of(source: Source) -> Recipe | None:
    """The recipe that lies beside a merge's weights; None if there is none. Raises RecipeError."""
    if RECIPE_FILE not in source.files:
        return None
    return make_recipe(_read(source.fetch(RECIPE_FILE)), where=f"{source.label}/{RECIPE_FILE}")


def check_task_code(fields: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError if a recipe from a file could run Python through lm-eval.

    Task files can call any Python of their folder, arguments of models can name some, and recipes come from strangers.
    """
    compared = fields.get("compare")
    selecting = compared.get("select") if isinstance(compared, Mapping) else None
    for key, asked in (("evaluate", fields.get("evaluate")), ("compare.select", selecting)):
        if isinstance(asked, Mapping):
            _check_evaluation_code(asked, key, where)


def _check_evaluation_code(asked: Mapping[str, Any], key: str, where: str) -> None:
    own = asked.get("lm_eval")
    if isinstance(own, Mapping) and own.get("model_args"):
        raise RecipeError(
            f"{where} gives arguments to lm-eval's model class ({key}.lm_eval.model_args), some of which have code "
            "of others run. Read them, then allow them with --allow-task-code, or evaluate the merge afterwards: "
            "hf-locstitch evaluate OUT --model-args KEY=VALUE..."
        )
    if asked.get("include_path") is not None:
        raise RecipeError(
            f"{where} asks for the task files in {asked['include_path']} ({key}.include_path), which can run any "
            "Python code. Read them, then allow it with --allow-task-code, or evaluate the merge afterwards: "
            "hf-locstitch evaluate OUT --include-path DIR."
        )


def dump_recipe(recipe: Recipe, *, whole: bool = False) -> str:
    """YAML for the same merge: what differs from the defaults.

    whole: also where it goes and how it is judged; else a recipe says no more than what the merge is.
    """
    fields = recipe.model_dump(mode="json", exclude={*NOT_THE_MERGE}, exclude_defaults=True)
    if whole:
        judging = {"evaluate": recipe.evaluate, "compare": recipe.compare}
        own = {*NOT_THE_MERGE} - judging.keys()
        fields |= recipe.model_dump(mode="json", include=own, exclude_defaults=True)
        fields |= {key: options.dump() for key, options in judging.items() if options is not None}
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
