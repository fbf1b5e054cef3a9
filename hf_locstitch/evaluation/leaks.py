"""The leak rule: what masks were found with is no test of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def leaks(evaluated: Mapping[str, str | None], localized_with: Sequence[str]) -> list[str]:
    """A warning for each data set that masks were found with and that is also evaluated on.

    evaluated: task -> id of its data set on the Hub. localized_with: ids on the Hub, or names of data sets, of tasks or
    of their families, or files. A data set is the same under any organisation and in any case: gsm8k is openai/gsm8k.
    """
    warnings = []
    for data in dict.fromkeys(localized_with):
        name = bare_name(data)
        for task, dataset in evaluated.items():
            family = bare_name(task)
            if name and (name == bare_name(dataset or "") or family == name or family.startswith(f"{name}_")):
                warnings.append(
                    f"{task} is evaluated on {dataset or data}, with which the masks were found ({data}): the score "
                    "says nothing about unseen examples. Localize with a surrogate."
                )
    return warnings


def bare_name(dataset: str) -> str:
    """openai/GSM8K:main@rev -> gsm8k; of a file, its name without the ending."""
    name = dataset.split("@")[0].split(":")[0].rstrip("/").rsplit("/", 1)[-1]
    return name.split(".")[0].lower().replace("-", "_")


def localization_data(recipe: Mapping[str, Any]) -> list[str]:
    """Every data set that a recipe's fields name under `data`, at any depth."""
    found: list[str] = []
    for key, value in recipe.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if key == "data":
            found += [name for one in values for name in _names(one)]
        else:
            found += [name for one in values if isinstance(one, Mapping) for name in localization_data(one)]
    return list(dict.fromkeys(found))


def _names(data: Any) -> list[str]:
    if isinstance(data, Mapping):
        return [str(value) for key, value in data.items() if key in ("name", "dataset", "path", "id", "ref", "file")]
    return [str(data)] if isinstance(data, str) else []
