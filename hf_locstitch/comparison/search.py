"""Which combinations are merged, one after another: all of them, or those that Optuna asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_locstitch.comparison.cells import all_settings
from hf_locstitch.plan.compare_options import CompareOptions
from hf_locstitch.runtime.packages import need

Measure = Callable[[Mapping[str, Any]], float]  # a combination -> its score, the larger the better


def check_search(options: CompareOptions) -> None:
    """Raises RecipeError if the combinations are to be chosen by a package that is not there."""
    if options.trials is None:
        return
    what = f"compare.trials (the choice of {options.trials} of {options.size} combinations)"
    need(what, "optuna", instead="Or drop trials, to merge all of them.")


def search(options: CompareOptions, measure: Measure) -> None:
    """Measure the combinations. The same scores lead to the same combinations, so that a search can be resumed."""
    if options.trials is None or options.trials >= options.size:
        for settings in all_settings(options):
            measure(settings)
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=options.seed))
    for _ in range(options.trials):
        trial = study.ask()
        number = trial.suggest_categorical("grid", range(len(options.grid)))
        grid = options.grid[number]
        chosen = {axis: trial.suggest_categorical(f"{number} {axis}", range(len(grid[axis]))) for axis in grid}
        study.tell(trial, measure({axis: grid[axis][place] for axis, place in chosen.items()}))
