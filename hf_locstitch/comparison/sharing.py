"""Scans that merges share: those whose masks keep the largest of the same scores, whatever their densities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.shared_scan import SharedScan
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.version import __version__

# Fields of a recipe that decide which numbers are scored.
SCORED = ("include", "exclude", "tokenizer", "embeddings", "allow_non_finite")


class Scans:
    """folder: for all scans. recipes: of the merges that may share them."""

    def __init__(self, folder: Path, recipes: Iterable[Recipe]) -> None:
        self._folder = folder
        self._largest = largest_densities(recipe.localizer for recipe in recipes if recipe.localizer is not None)

    def of(self, recipe: Recipe, plan: MergePlan) -> SharedScan | None:
        """The one that a plan shares with others; None if it has none, or one of its own. recipe: the plan's as it was
        written, without the device that the command asks for."""
        scoring = plan.localizer.scoring() if plan.masked else None
        if scoring is None or recipe.localizer is None:
            return None
        localizer = plan.localizer.model_copy(update={"density": self._largest[_key(recipe.localizer.scoring())]})
        most = localizer.groups([info.numel for info in plan.mask_tensors])
        return SharedScan(self._folder / scan_key(plan, scoring), most)

    @property
    def finished(self) -> int:
        """How many were made."""
        return len(list(self._folder.glob("*/verified")))


def largest_densities(localizers: Iterable[Localizer]) -> dict[str, float | None]:
    """What the localizers score, and how -> the largest density among those that agree in it."""
    found: dict[str, float | None] = {}
    for localizer in localizers:
        key = _key(localizer.scoring())
        found[key] = max((one for one in (found.get(key), localizer.density) if one is not None), default=None)
    return found


def scan_key(plan: MergePlan, scoring: Mapping[str, object]) -> str:
    """The same for plans that score the same numbers in the same way, `scoring`."""
    facts = {
        "version": __version__,
        "scoring": scoring,
        "inputs": {name: checkpoint.source.identity for name, checkpoint in plan.inputs.items()},
        "data": {name: found.pinned.model_dump(mode="json") for name, found in plan.data.items()},
        "recipe": plan.recipe.model_dump(mode="json", include={*SCORED}),
        "tensors": [info.name for info in plan.mask_tensors],
    }
    return hashlib.sha256(_key(facts).encode()).hexdigest()[:16]


def _key(facts: object) -> str:
    return json.dumps(facts, sort_keys=True)
