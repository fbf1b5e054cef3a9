"""A comparison planned: its merges, and what they have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.comparison.cells import Cell, all_settings, check_grid, key_of, make_cells
from hf_locstitch.comparison.search import check_search
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.checking import judged_on
from hf_locstitch.plan.cost import estimate, files_here
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime import escape
from hf_locstitch.runtime.human import human
from hf_locstitch.runtime.processes import find_processes
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.runtime.version import __version__
from hf_locstitch.tasks.leaks import leaks

SHOWN = 40  # merges that a plan lists


class Comparison:
    """What is compared, planned. asked: the recipe, with where the best merge is pushed; fields: as it was written."""

    def __init__(self, asked: Recipe, fields: Mapping[str, Any], settings: Settings) -> None:
        """Raises RequestError."""
        if asked.compare is None:
            raise RecipeError(
                "the recipe does not say what to compare: it needs `compare:` with a `grid:` of values to try and "
                "`select:` to judge them by, such as compare: {grid: {density: [0.05, 0.1]}, select: {suite: quick}}."
            )
        if asked.localized:
            raise RecipeError("the masks of localized checkpoints are given: compare needs `finetuned:` models.")
        if find_processes().count > 1:
            raise RecipeError("a comparison works in one process. Run it without the launcher.")
        self.asked, self.fields, self.options, self.settings = asked, fields, asked.compare, settings
        check_grid(self.options)
        check_search(self.options)
        self._cells = make_cells(fields, all_settings(self.options))
        self.cells = {cell.identity: cell for cell in self._cells.values()}
        self._plans: dict[str, MergePlan] = {}
        self._open = lru_cache(maxsize=None)(open_checkpoint)  # once: a branch may move while merges are made
        for cell in self.cells.values() if self.options.trials is None else [self.first]:
            self.plan(cell)

    @property
    def first(self) -> Cell:
        """Any of the cells: the inputs are those of all."""
        return next(iter(self.cells.values()))

    def cell(self, settings: Mapping[str, Any]) -> Cell:
        """That of a combination."""
        return self._cells[key_of(settings)]

    def plan(self, cell: Cell) -> MergePlan:
        """Raises RequestError."""
        if cell.identity not in self._plans:
            try:
                plan = make_plan(cell.recipe.model_copy(update={"figures": False}), self.settings, self._open)
            except RecipeError as error:
                raise RecipeError(f"combination ({cell.label}): {error}") from error
            assert isinstance(plan, MergePlan)
            self._plans[cell.identity] = plan
        return self._plans[cell.identity]

    @property
    def largest(self) -> MergePlan:
        """Of those planned, the one whose masks keep most."""
        return max(self._plans.values(), key=lambda plan: plan.k if plan.masked else 0)

    def published(self, cell: Cell, out: Path) -> MergePlan:
        """The plan of the chosen cell: evaluated, and pushed if that is asked for, else made in `out`."""
        plan = self.plan(cell)
        own = {"evaluate": self.asked.evaluate or self.options.select, "figures": self.asked.figures}
        target = {key: getattr(self.asked, key) for key in ("push_to", "private", "create_pr")}
        place = {"out": out} if self.asked.push_to is None else {}
        return replace(plan, recipe=plan.recipe.model_copy(update={**own, **target, **place}))

    @cached_property
    def warnings(self) -> list[str]:
        """Of examples that decide although merges were made with them."""
        judged = judged_on(self.options.select)
        used = (data for cell in self.cells.values() for data in cell.recipe.used_data)
        return [f"compare.select: {warning}" for warning in leaks(judged, used)]

    @property
    def count(self) -> int:
        """How many merges are made, at most."""
        return min(len(self.cells), self.options.trials or len(self.cells))

    def as_json(self) -> dict[str, Any]:
        """The plan, as plain values."""
        merges = [{"label": cell.label, "settings": dict(cell.settings)} for cell in self.cells.values()]
        return {"merges": merges, "count": self.count, **self.options.model_dump(mode="json", exclude={"grid"})}

    def describe(self) -> str:
        """For people."""
        plan = self.plan(self.first)
        labels = [cell.label for cell in self.cells.values()]
        shown = labels if len(labels) <= SHOWN else [*labels[: SHOWN - 1], f"and {len(labels) - SHOWN + 1} more"]
        lines = [f"base       {plan.base.label}", f"finetuned  {', '.join(plan.finetuned)}"]
        lines += [f"merges     {self.count}" + (f" of {len(labels)}, chosen by Optuna" if self.options.trials else "")]
        lines += [f"           {label}" for label in shown]
        lines += [f"chosen by  {self.options.by}"]
        cost = estimate(self.largest, files_here(self.largest))
        lines += [
            f"cost       to download: {human(cost.download)}, read for each merge: {human(cost.read)}, "
            f"disk up to {human(cost.disk)}"
        ]
        warned = dict.fromkeys(warning for plan in self._plans.values() for warning in plan.warnings)
        lines += [f"warning    {warning}" for warning in (*warned, *self.warnings)]
        return "\n".join(map(escape.line, lines))

    @property
    def fingerprint(self) -> str:
        """Of everything that the scores depend on."""
        inputs = self.plan(self.first).inputs
        facts = {
            "version": __version__,
            "recipe": self.asked.model_dump(mode="json", exclude={"push_to", "private", "create_pr"}),
            "inputs": {name: checkpoint.source.identity for name, checkpoint in inputs.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
