"""The cells of a comparison: one recipe for each combination of the values that are tried."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from typing import Any

from hf_locstitch.errors import RecipeError
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.plan.compare_options import LARGEST, SEARCHED, CompareOptions
from hf_locstitch.plan.overrides import LOCALIZER, as_fields, overridden
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.plan.recipe_file import NOT_THE_MERGE, dump_recipe
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.stitchers import MEAN

# The same for all merges of a comparison.
COMMON = {"base", "finetuned", "localized", "data", "figures", *NOT_THE_MERGE}
AXES = sorted({*Recipe.model_fields, *LOCALIZER} - COMMON)


@dataclass(frozen=True)
class Cell:
    """settings: the values of the axes that this merge has. recipe: without outputs and evaluation."""

    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        """For people: `ties, density 0.1`."""
        return ", ".join(shown(axis, value) for axis, value in self.settings.items()) or "as the recipe has it"

    @property
    def density(self) -> float | None:
        """The share of weights that each finetune's mask, or the method itself, keeps; None if all are used."""
        localizer = self.recipe.localizer
        density = getattr(self.recipe.method, "density", None) if localizer is None else localizer.density
        return density if isinstance(density, float) else None  # a method may have several, by globs

    @cached_property
    def identity(self) -> str:
        """The same for combinations that give the same merge."""
        return dump_recipe(self.recipe)


def shown(axis: str, value: Any) -> str:
    """A value of an axis, for people."""
    name = "name" if axis == "method" else "method"
    if isinstance(value, Mapping) and name in value:
        rest = " ".join(f"{key} {setting}" for key, setting in value.items() if key != name)
        return f"{value[name]} ({rest})" if rest else str(value[name])
    return str(value) if axis in ("method", "localizer") else f"{axis} {value}"


def check_grid(options: CompareOptions) -> None:
    """Raises RecipeError for axes that there are not, and for more merges than one comparison may have."""
    for axis in (axis for grid in options.grid for axis in grid):
        if axis not in AXES:
            near = get_close_matches(axis, AXES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(AXES)}"
            raise RecipeError(f"compare.grid: merges cannot differ in {axis!r} ({hint}).")
    bound = LARGEST if options.trials is None else SEARCHED
    if options.size > bound:
        raise RecipeError(
            f"compare.grid has {options.size:,} combinations, more than {bound:,}. Try fewer values"
            + (", or set compare.trials to how many of them to merge." if options.trials is None else ".")
        )


def all_settings(options: CompareOptions) -> Iterator[dict[str, Any]]:
    """Every combination of the values that are tried, the last axis fastest."""
    for grid in options.grid:
        for values in product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def make_cells(fields: Mapping[str, Any], settings: Iterator[Mapping[str, Any]]) -> dict[str, Cell]:
    """The cell of each combination, by its key; combinations that give the same merge have the same one. fields: of the
    recipe.

    Raises RecipeError with the first combination that is no recipe.
    """
    cells: dict[str, Cell] = {}
    merges: dict[str, Cell] = {}
    for combination in settings:
        cell = _make_cell(fields, combination)
        cells[key_of(combination)] = merges.setdefault(cell.identity, cell)
    return cells


def key_of(combination: Mapping[str, Any]) -> str:
    """The same for the same values of the same axes."""
    return json.dumps(combination, sort_keys=True, default=str)


def _make_cell(fields: Mapping[str, Any], combination: Mapping[str, Any]) -> Cell:
    """The recipe's fields with these values. What a method does not have is left out: a density of `average`.

    Raises RecipeError.
    """
    common = {key: value for key, value in fields.items() if key not in NOT_THE_MERGE or key == "strict"}
    method = as_fields("name", combination.get("method", fields.get("method") or "locstitch"))
    absent = _absent(str(method.get("name")))
    if "method" in combination and method.get("densities"):  # one for each finetune, in place of one for all
        absent = [*absent, "density"]
    settings = {axis: combination[axis] for axis in sorted(combination, key=_place) if axis not in absent}
    laid = overridden({key: value for key, value in common.items() if key not in absent}, settings)
    if not uses_data(laid):
        laid.pop("data", None)
    label = ", ".join(shown(axis, value) for axis, value in settings.items())
    return Cell(settings, make_recipe(laid, where=f"combination ({label})"))


def _place(axis: str) -> int:
    """Where an axis stands in tables: what decides most comes first."""
    leading = ("method", *LOCALIZER)
    return leading.index(axis) if axis in leading else len(leading)


def _absent(method: str) -> Sequence[str]:
    """The axes that a method does not have; none of an unknown one, which is refused as such."""
    if method not in METHODS.names():
        return ()
    found = METHODS.find(method)
    absent = [] if method == "locstitch" else ["stitch"]
    if not found.weighted:
        absent.append("weights")
    if not found.masked:
        absent += [axis for axis in LOCALIZER if axis not in found.model_fields]
    return absent


def uses_data(fields: Mapping[str, Any]) -> bool:
    """Whether the recipe's data is for something in it."""
    method = as_fields("name", fields.get("method")).get("name")
    localizer = as_fields("method", fields.get("localizer")).get("method")
    named = ((METHODS, method), (LOCALIZERS, localizer))
    if any(registry.find(name).needs_data for registry, name in named if name in registry.names()):
        return True
    stitch = as_fields("method", fields.get("stitch"))
    return bool(stitch) and stitch.get("method") != MEAN
