"""The leak rule: what masks were found with is no test of the merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def leaks(evaluated: Mapping[str, str | None], localized_with: Sequence[str]) -> list[str]:
    """A warning for each data set that masks were found with and that is also evaluated on.

    evaluated: task -> id of its data set on the Hub. localized_with: ids on the Hub, or names of data sets, of tasks or
    of their families, or files. A data set is the same under any organisation and spelling: gsm8k is openai/GSM8K.
    """
    warnings = []
    for data in dict.fromkeys(localized_with):
        name = bare_name(data)
        for task, dataset in evaluated.items():
            if name and name in {bare_name(dataset or ""), *_families(task)}:
                warnings.append(
                    f"{task} is evaluated on {dataset or data}, with which the masks were found ({data}): the score "
                    "says nothing about unseen examples. Localize with a surrogate."
                )
    return warnings


def bare_name(dataset: str) -> str:
    """hotpotqa/Hotpot_QA:distractor@rev -> hotpotqa; of a file, its name without the ending."""
    name = dataset.split("@")[0].split(":")[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub("[^a-z0-9]", "", name.split(".")[0].lower())


def _families(task: str) -> list[str]:
    """mmlu_high_school_physics -> mmlu, mmluhigh, …, the whole name."""
    parts = [bare_name(part) for part in task.split("_")]
    return ["".join(parts[: count + 1]) for count in range(len(parts))]


def localization_data(recipe: Mapping[str, Any]) -> list[str]:
    """Every localization set that a recipe's fields name under `data`: by name of the finetune, or in order."""
    data = recipe.get("data") or ()
    sets = data.values() if isinstance(data, Mapping) else [data] if isinstance(data, str) else data
    refs = [one.get("ref") if isinstance(one, Mapping) else one for one in sets]
    return list(dict.fromkeys(str(ref) for ref in refs if ref))
