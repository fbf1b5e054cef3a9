"""Labelled sets that models are judged on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.parsing import parse_yaml
from hf_locstitch.tasks.sets import ExampleSet, OpenSet, choose, open_set
from hf_locstitch.tasks.splits import whole

SPLITS = ("test", "validation", "dev", "valid", "val", "train")  # the first that there is, unless one is asked for
NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<ref>.+)", re.DOTALL)
FILES = (".yaml", ".yml")


class EvaluationSet(ExampleSet):
    """A labelled set of which every row is judged.

    split: `test` by default, or else `validation`, as the data set has it. number: of rows at most, drawn with a fixed
    seed; all by default. head: the name of the input whose head judges every model, a finetune or `base`; by default
    as the objective has it. metrics: the first is the main one; accuracy or loss by default.
    """

    judged: ClassVar[bool] = True

    number: int | None = Field(default=None, ge=1)
    head: str | None = None
    metrics: tuple[str, ...] = ()

    def draw(self, labels: Sequence[Any] | None, count: int) -> Sequence[int]:
        """In order, or if fewer are asked for, at random: some files are sorted by class."""
        return range(count) if self.number is None else sorted(choose(None, count, self.number, seed=0))

    @property
    def amount(self) -> str:
        return "all rows" if self.number is None else f"up to {counted(self.number, 'drawn row')}"


def named_sets(given: Any) -> dict[str, Any]:
    """Entries by name. given: such a mapping; or one or more of NAME=REF, REF (named by its last part), and YAML files
    that hold such a mapping. Raises RecipeError if a name is given twice or a file cannot be read."""
    if isinstance(given, Mapping):
        return dict(given)
    entries: dict[str, Any] = {}
    for one in [given] if isinstance(given, str | Path) else given:
        for name, entry in _entries(str(one)).items():
            if name in entries:
                raise RecipeError(f"two sets are named {name!r}. Name them apart: --data NAME=REF.")
            entries[name] = entry
    return entries


def _entries(text: str) -> dict[str, Any]:
    if text.endswith(FILES):
        try:
            found = parse_yaml(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read the sets in {text}: {error}. Check the file.") from error
        if not isinstance(found, dict):
            raise RecipeError(f"{text} must map names to sets, as `evaluate: {{data: …}}` in a recipe does.")
        return found
    if match := NAMED.fullmatch(text):
        return {match["name"]: match["ref"]}
    return {Path(text.partition("@")[0]).name.split(".")[0]: text}


def open_evaluation_set(asked: EvaluationSet) -> tuple[OpenSet[EvaluationSet], str | None]:
    """Locate and pin it, and settle its split. Returns it and, if it has no test split, what is judged in its place.

    Raises RequestError.
    """
    opened = open_set(asked)
    if opened.file is not None:
        return _of_split(opened, asked.split or SPLITS[0]), None
    known = _splits(opened)
    if asked.split is not None and not any(whole(asked.split) == split for split in known):
        raise RequestError(
            f"{opened.label} has no split {asked.split!r}: it has {', '.join(known)}. Check the data's `split`."
        )
    split = asked.split or next((split for split in SPLITS if split in known), known[0])
    note = f"it has no split {SPLITS[0]}: {split} is judged" if asked.split is None and split != SPLITS[0] else None
    return _of_split(opened, split), note


def _of_split(opened: OpenSet[EvaluationSet], split: str) -> OpenSet[EvaluationSet]:
    return replace(opened, asked=opened.asked.model_copy(update={"split": split}))


def _splits(opened: OpenSet[EvaluationSet]) -> list[str]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return list(datasets.get_dataset_split_names(str(opened.repo), opened.config, revision=opened.commit))
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise RequestError(
            f"the splits of {opened.label} cannot be listed ({' '.join(str(error).split())[:300]}). Check its config."
        ) from error
