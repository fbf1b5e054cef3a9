"""The leak rule: data that masks were found with, or values fitted to, cannot test the merge."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_locstitch.checkpoints.ref import is_written_as_path
from hf_locstitch.tasks.evaluation_sets import SPLITS
from hf_locstitch.tasks.sets import BUILDERS, ExampleSet, OpenSet, read_rows
from hf_locstitch.tasks.splits import may_share_rows, may_share_rows_of_file
from hf_locstitch.tasks.surrogates import find_surrogate

Use = Literal["masks were found", "values were fitted"]


@dataclass(frozen=True)
class UsedData:
    """A data set that a merge was made with. name: as requested. repo, config: on the Hub; a file has none.

    prompts: the questions of the rows that were used, if available. sha256: of a file, if known.
    """

    name: str
    use: Use
    repo: str | None
    config: str | None
    prompts: frozenset[str] | None = None
    split: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class JudgedTask:
    """A task that a merge is judged on. dataset, config: on the Hub, if known; of a labelled set also a file's name.

    prompts: the texts of its examples, if available. split: of a labelled set, whose name says nothing of its data.
    sha256: of its file.
    """

    name: str
    dataset: str | None = None
    config: str | None = None
    prompts: frozenset[str] | None = None
    split: str | None = None
    sha256: str | None = None


def used_set(asked: ExampleSet, use: Use) -> UsedData:
    """From its name in a recipe."""
    name = asked.ref.partition("@")[0]
    if known := find_surrogate(name):
        return UsedData(asked.ref, use, known.repo, asked.config or known.config, split=asked.split)
    if is_file(name):
        return UsedData(asked.ref, use, None, asked.config, split=asked.split, sha256=asked.sha256)
    return UsedData(asked.ref, use, name, asked.config, split=asked.split)


def is_file(ref: str) -> bool:
    """Whether a set's ref names a file, there or not."""
    return Path(ref).suffix in BUILDERS or ref.startswith(".") or is_written_as_path(ref)


def judged_set(name: str, asked: ExampleSet) -> JudgedTask:
    """A labelled set, from its entry in a recipe."""
    if is_file(asked.ref):
        return JudgedTask(name, Path(asked.ref).name, split=asked.split or SPLITS[0], sha256=asked.sha256)
    used = used_set(asked, "masks were found")
    return JudgedTask(name, used.repo, used.config, split=asked.split or SPLITS[0])


def used_open_set(opened: OpenSet, use: Use) -> UsedData:
    """From an opened set; for a file, with its prompts."""
    if opened.file is None:
        return UsedData(opened.asked.ref, use, opened.repo, opened.config, split=opened.asked.split)
    prompts = frozenset(_prompts(read_rows(opened, labels=False)))
    return UsedData(opened.label, use, None, None, prompts, opened.asked.split, opened.sha256)


def leaks(judged: Sequence[JudgedTask], used: Iterable[UsedData]) -> list[str]:
    """A warning for each task whose data the merge was made with, or whose name suggests so.

    A data set is identified by its repo and config, and the split where a set is judged that was asked for by it;
    slices of a split may share no row. A file leaks if the task contains one of its rows. If rows cannot be compared,
    or only a task's name is known, names are compared.
    """
    warnings = []
    for data in dict.fromkeys(used):
        for task in judged:
            if _is_same(task, data):
                warnings.append(
                    f"{task.name} is evaluated on {task.dataset or data.name}, with which {data.use} ({data.name}): "
                    "the score says nothing about unseen examples. Use a surrogate."
                )
            elif _may_be_same(task, data):
                warnings.append(
                    f"{task.name} is named like {data.name}, with which {data.use}: if they share examples, the score "
                    "says nothing about unseen ones. Use a surrogate."
                )
    return list(dict.fromkeys(warnings))


def texts_of(example: Any) -> Iterable[str]:
    """Every text in an example of any structure."""
    if isinstance(example, str):
        yield _plain(example)
    elif isinstance(example, Mapping):
        for value in example.values():
            yield from texts_of(value)
    elif isinstance(example, Collection) and not isinstance(example, bytes):
        for value in example:
            yield from texts_of(value)


def _is_same(task: JudgedTask, data: UsedData) -> bool:
    if data.repo is None:
        same_rows = _is_same_file(task, data) and may_share_rows_of_file(task.split, data.split)
        return same_rows or bool(data.prompts and task.prompts and data.prompts & task.prompts)
    if task.dataset is None or task.dataset.lower() != data.repo.lower():
        return False
    if task.split is not None and data.split is not None and not may_share_rows(task.split, data.split):
        return False
    return task.config is None or data.config is None or task.config == data.config


def _is_same_file(task: JudgedTask, data: UsedData) -> bool:
    return data.sha256 is not None and data.sha256 == task.sha256


def _may_be_same(task: JudgedTask, data: UsedData) -> bool:
    if data.repo is None and _is_same_file(task, data):
        return False  # slices that share no row
    if data.repo is None and data.prompts is not None and task.prompts is not None:
        return False  # compared, and different
    if data.repo is not None and task.dataset is not None and task.dataset.lower() == data.repo.lower():
        return False  # another config or split
    name = bare_name(data.repo or data.name)
    families = _families(task.name) if task.split is None else ()
    return bool(name) and name in {bare_name(task.dataset or ""), *families}


def bare_name(dataset: str) -> str:
    """hotpotqa/Hotpot_QA@rev -> hotpotqa; of a file, its name without the ending."""
    name = dataset.split("@")[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub("[^a-z0-9]", "", name.split(".")[0].lower())


def _families(task: str) -> list[str]:
    """mmlu_high_school_physics -> mmlu, mmluhigh, …, the whole name."""
    parts = [bare_name(part) for part in task.split("_")]
    return ["".join(parts[: count + 1]) for count in range(len(parts))]


def _prompts(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """The question of each row; answers and labels may coincide with those of other rows."""
    for row in rows:
        asked = row.get("messages") or row.get("prompt") or row.get("text") or ""
        yield from texts_of(asked[:1] if isinstance(asked, list) else asked)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
