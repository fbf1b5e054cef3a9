"""Tasks that `data` takes by name: a data set, its columns, and what a model is asked. named_tasks.yaml lists them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hf_locstitch.runtime.parsing import parse_yaml

FILE = Path(__file__).with_suffix(".yaml")
OF_TRAINING = ("limit", "role")  # fields that hold for the split that finetunes are trained on


@cache
def named_tasks() -> Mapping[str, Mapping[str, Any]]:
    """Fields of a localization set by name, and what holds where models are judged: `test`, the split, and `metrics`
    where they are not the usual ones."""
    return parse_yaml(FILE.read_text(encoding="utf-8"))


def with_named_task(fields: Mapping[str, Any], judged: bool = False) -> Mapping[str, Any]:
    """The fields of a set whose `ref` may be the name of a task, or name@revision; what is given wins.

    judged: whether models are judged on it, on the split and by the metrics that the task has for that, and are not
    trained or localized.
    """
    name, at, revision = str(fields.get("ref")).partition("@")
    if "/" in name or name not in named_tasks():
        return fields
    known = {"role": "finetuning", **named_tasks()[name]}
    of_judging = {"split": known.pop("test"), **({"metrics": own} if (own := known.pop("metrics", ())) else {})}
    left_out = OF_TRAINING if judged or "split" in fields else ()
    known = {key: value for key, value in known.items() if key not in left_out}
    return {**known, **(of_judging if judged else {}), **fields, "ref": f"{known['ref']}{at}{revision}"}
