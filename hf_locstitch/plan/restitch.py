"""A merge taken apart: the recipe that stitches its finetunes again, with others added or some removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hf_locstitch.artifacts.manifest import RECIPE_FILE, Manifest
from hf_locstitch.artifacts.merged_finetune import open_merge
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, RecipeError
from hf_locstitch.plan.recipe import OF_TOKENS, Finetuned, Recipe
from hf_locstitch.plan.recipe_file import recipe_of
from hf_locstitch.plan.token_models import LOCALIZE, MEAN
from hf_locstitch.runtime.progress import hide_library_bars

# Fields that the new merge has, too; the latter may name a finetune.
CARRIED_OVER = ("scale", "also_copy", "dtype", "shard_size", "allow_non_finite", *OF_TOKENS)
FROM_A_FINETUNE = ("rest_from", "files_from")


@dataclass(frozen=True)
class Change:
    """What becomes of a merge. merge, add: refs. remove: names. base, finetuned: where its inputs are, if not where it
    says; one for each finetune that stays, in its order."""

    merge: str
    add: Sequence[str] = ()
    remove: Sequence[str] = ()
    base: str | None = None
    finetuned: Sequence[str] | None = None


def restitch(change: Change) -> dict[str, Any]:
    """The fields of a recipe for stitching. Raises RequestError if the merge cannot be taken apart like that."""
    if not change.add and not change.remove:
        raise RecipeError(
            f"nothing is to be added to {change.merge} or removed from it: use --add REF or --remove NAME."
        )
    with hide_library_bars():
        source, record = open_merge(parse_ref(change.merge))
        recipe = _recipe_of(source)
    _check_rows(source, record)
    stays = _staying(source, recipe, change.remove)
    if not stays and not change.add:
        raise RecipeError(f"nothing of {source.label} would be left. Keep one of its finetunes, or add one.")
    refs = _refs(source, stays, change.finetuned)
    base = change.base or recipe.base.ref
    _check_here(source, base, stays, refs, change.finetuned is not None)
    merge = str(parse_ref(change.merge).folder or source.pinned)
    kept = [_entry(recipe, one, ref, merge) for one, ref in zip(stays, refs, strict=True)]
    settings = {key: value for key, value in _set(recipe).items() if key in CARRIED_OVER}
    if settings.get("embeddings") == LOCALIZE:  # which the masks say
        del settings["embeddings"]
    _check_named(source, settings, change)
    return {**settings, "base": base, "localized": [*kept, *({"ref": ref} for ref in change.add)]}


def _recipe_of(source: Source) -> Recipe:
    recipe = recipe_of(source)
    if recipe is None:
        raise CheckpointError(f"{source.label} has no {RECIPE_FILE}, which says what it is made of. Fetch it again.")
    if given := [f"{field}: {value}" for field in FROM_A_FINETUNE if (value := getattr(recipe, field)) is not None]:
        raise RecipeError(
            f"{source.label} has more of one finetune than its mask keeps ({', '.join(given)}): it does not consist of "
            "parts. Run its recipe with the finetunes wanted."
        )
    return recipe


def _check_rows(source: Source, record: Manifest) -> None:
    """Raises RecipeError if masks range over rows that were matched by the tokens of all finetunes."""
    if record.vocabulary is not None and record.vocabulary.get("embeddings") == LOCALIZE:
        raise RecipeError(
            f"the masks of {source.label} range over rows of embeddings that are matched by its finetunes' tokens: "
            "with other finetunes they would be other rows. Run its recipe with the finetunes wanted."
        )


def _check_named(source: Source, settings: Mapping[str, Any], change: Change) -> None:
    """Raises RecipeError if tokens, rows or the template are those of a finetune that is removed, or need its rows."""
    if taken := [f"{field}: {settings[field]}" for field in OF_TOKENS if settings.get(field) in change.remove]:
        raise RecipeError(
            f"{source.label} has {', '.join(taken)}, of a finetune that is to be removed. Run its recipe with the "
            "finetunes wanted and another choice."
        )
    if settings.get("embeddings") == MEAN and change.add:
        raise RecipeError(
            f"{source.label} has embeddings: mean, and what is added has no embeddings of its own. Run its recipe with "
            "the finetunes wanted."
        )


def _staying(source: Source, recipe: Recipe, remove: Sequence[str]) -> list[Finetuned]:
    """The finetunes that are not removed. Raises RecipeError for unknown names, with the nearest ones."""
    names = [str(entry.name) for entry in recipe.entries]
    if unknown := [name for name in remove if name not in names]:
        near = {name: get_close_matches(name, names, n=1, cutoff=0.0)[0] for name in unknown}
        meant = "; ".join(f"{name!r} is not one of them, did you mean {close!r}?" for name, close in near.items())
        raise RecipeError(f"{source.label} is made of {', '.join(names)}: {meant}")
    return [entry for entry in recipe.entries if entry.name not in remove]


def _refs(source: Source, stays: Sequence[Finetuned], asked: Sequence[str] | None) -> list[str]:
    if asked is not None and len(asked) != len(stays):
        names = ", ".join(str(entry.name) for entry in stays)
        raise RecipeError(
            f"of {source.label} {len(stays)} stay ({names}): --ft expects {len(stays)}, got {len(asked)}. Name one REF "
            "for each, in this order."
        )
    return list(asked) if asked is not None else [entry.ref for entry in stays]


def _check_here(source: Source, base: str, stays: Sequence[Finetuned], refs: Sequence[str], asked: bool) -> None:
    """Raises CheckpointError if folders that the merge names are not here, with the flags that say where they are."""
    absent = [f"the base {base} (--base REF)"] if _is_absent(base) else []
    if gone := [ref for ref in refs if _is_absent(ref)]:
        order = ", ".join(str(entry.name) for entry in stays)
        absent.append(f"{', '.join(gone)}" + ("" if asked else f" (--ft REF..., for {order} in this order)"))
    if absent:
        raise CheckpointError(
            f"{source.label} was made from folders that are not here: {'; '.join(absent)}. Give the command where they "
            "are, or say where."
        )


def _is_absent(ref: str) -> bool:
    folder = parse_ref(ref).folder
    return folder is not None and not folder.is_dir()


def _entry(recipe: Recipe, entry: Finetuned, ref: str, merge: str) -> dict[str, Any]:
    """A finetune with its mask in the merge; or the localized checkpoint that it came through."""
    own: dict[str, Any] = {"ref": ref, "name": entry.name}
    if entry.sha256 is not None:
        own["sha256"] = entry.sha256
    if recipe.localized and getattr(entry, "mask", None) is None:
        return own
    return {**own, "mask": {"ref": merge, "name": entry.name}}


def _set(recipe: Recipe) -> Mapping[str, Any]:
    """The fields that differ from their defaults."""
    return recipe.model_dump(mode="json", exclude_defaults=True)
