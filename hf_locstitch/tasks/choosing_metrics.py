"""Which metrics a set is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from hf_locstitch.errors import RecipeError
from hf_locstitch.tasks.metric import Metric
from hf_locstitch.tasks.metrics import METRICS
from hf_locstitch.tasks.objective import Objective


def chosen_metrics(asked: Sequence[str], objective: Objective, classes: int, where: str) -> dict[str, Metric]:
    """Those that are asked for, in order, or else the usual ones, by name. classes: how many there are. where: the set.

    Raises RecipeError if one is unknown or not defined for the objective.
    """
    if unknown := [name for name in asked if name not in METRICS.names()]:
        raise RecipeError(f"unknown metric {unknown[0]!r} ({METRICS.hint(unknown[0])}).")
    suited = {name: metric for name in METRICS.names() if (metric := METRICS.find(name)()).suits(objective, classes)}
    if unfit := [name for name in asked if name not in suited]:
        what = f"{objective.kind} with {classes} classes" if classes > 1 else str(objective.kind)
        raise RecipeError(
            f"the metric {unfit[0]} is not defined for {what}, by which {where} is judged "
            f"(choose from {', '.join(suited) or 'none'})."
        )
    usual = sorted((metric.usual, name) for name, metric in suited.items() if metric.usual is not None)
    return {name: suited[name] for name in asked or [name for _, name in usual]}
