"""Localization sets: a few examples of each finetune's task, from a file, the Hub, or a named surrogate."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hf_locstitch.checkpoints.ref import FOLDER_PREFIXES, REPO_ID
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import CheckpointError, RecipeError, RequestError
from hf_locstitch.runtime.human import nearest
from hf_locstitch.tasks.named_tasks import named_tasks, with_named_task
from hf_locstitch.tasks.objectives import AnyObjective
from hf_locstitch.tasks.surrogates import SURROGATES, find_surrogate

COUNTED = 1 << 28  # bytes of a file whose rows are counted before the work
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = (("messages",), ("prompt", "completion"), ("image", "label"), ("text", "label"), ("text",))


class LocalizationSet(BaseModel):
    """ref: alpaca, gsm8k or hotpotqa; or a task of the paper, such as sst2, which gives all fields but `number` and
    `seed`; or a JSONL, JSON, CSV or Parquet file; or a data set org/name[@revision].

    config, split: of the data set. number: of examples, or of examples of each class where there are labels; drawn
    with `seed`. limit: of examples in all. columns: our name -> the data's, for `text`, `text_b`, `prompt`,
    `completion`, `messages`, `image`, `label`. where: a column of the data -> the values that rows may have in it.
    labels: a label of the data -> a class by number or name, where it is another. rendering: how a surrogate's rows
    become prompt and completion. objective: by the model's architecture unless given. role: how these examples relate
    to the finetune, for the record. sha256: expected of a local file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    number: int = Field(default=64, ge=1)
    seed: int = 0
    limit: int | None = Field(default=None, ge=1)
    columns: Mapping[str, str] = Field(default_factory=dict)
    where: Mapping[str, tuple[str | int | float | bool | None, ...]] = Field(default_factory=dict)
    labels: Mapping[str, int | str] = Field(default_factory=dict)
    rendering: str | None = None
    objective: AnyObjective | None = None
    role: Literal["finetuning", "held-out", "surrogate"] | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        value = {"ref": str(value)} if isinstance(value, str | Path) else value
        if not isinstance(value, dict):
            return value
        return {"role": "surrogate", **value} if find_surrogate(str(value.get("ref"))) else with_named_task(value)

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {str(label): known for label, known in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _can_render(self) -> LocalizationSet:
        known = find_surrogate(self.ref)
        choices = list(known.renderings) if known and not self.columns else []
        if self.rendering is not None and self.rendering not in choices:
            named = ", ".join(choices) or "none, for it is no surrogate with its own columns"
            raise ValueError(f"rendering: {self.ref} has no {self.rendering!r}; choose from: {named}")
        return self

    def dump(self) -> dict[str, Any]:
        """Fields that request the same set: all that differ from the defaults."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return fields | ({"objective": self.objective.model_dump(mode="json")} if self.objective else {})


@dataclass(frozen=True)
class OpenSet:
    """A localization set, located and pinned. repo, commit: on the Hub; file, sha256: of a local file."""

    asked: LocalizationSet
    repo: str | None = None
    commit: str | None = None
    config: str | None = None
    file: Path | None = None
    sha256: str | None = None

    @property
    def label(self) -> str:
        return str(self.file) if self.file else f"{self.repo}@{(self.commit or '')[:7]}"

    @cached_property
    def rows(self) -> int | None:
        """At most how many examples there are, where that is told at once: from the lines of a local file."""
        if self.file is None or self.file.suffix not in (".jsonl", ".csv") or self.file.stat().st_size > COUNTED:
            return None
        with self.file.open("rb") as lines:
            return sum(not line.isspace() for line in lines) - (self.file.suffix == ".csv")  # its head

    @property
    def pinned(self) -> LocalizationSet:
        """A set that requests exactly these examples, without the path of a local file."""
        if self.file:
            return self.asked.model_copy(update={"ref": f"./{self.file.name}", "sha256": self.sha256})
        name = self.asked.ref.partition("@")[0]
        return self.asked.model_copy(update={"ref": f"{name}@{self.commit}"})

    def describe(self) -> str:
        asked = self.asked
        part = f"{self.config}, " if self.config else ""
        role = f", {asked.role} data" if asked.role else ""
        limit = f", {asked.limit} in all" if asked.limit else ""
        number = f"up to {asked.number} examples, or of each class{limit}"
        return f"{self.label} ({part}{asked.split}, {number}, seed {asked.seed}{role})"


def open_set(asked: LocalizationSet) -> OpenSet:
    """Locate and pin a set, without reading examples. Raises RecipeError or CheckpointError."""
    name, _, revision = asked.ref.partition("@")
    if (path := Path(asked.ref).expanduser()).is_file() or asked.ref.startswith(FOLDER_PREFIXES):
        return _open_file(asked, path)
    if known := find_surrogate(asked.ref):
        return _open_repo(asked, known.repo, revision or None, asked.config or known.config)
    if Path(name).suffix in BUILDERS or "/" not in name or not REPO_ID.fullmatch(name):
        known = [*SURROGATES, *named_tasks()]
        raise RecipeError(
            f"the data {asked.ref!r} is neither a local file, nor one of {', '.join(known)}, nor a data set "
            f"org/name{nearest(name, known) or '.'} Check the path or the name."
        )
    return _open_repo(asked, name, revision or None, asked.config)


def _open_file(asked: LocalizationSet, path: Path) -> OpenSet:
    if not path.is_file() or path.suffix not in BUILDERS:
        fault = "does not exist" if not path.is_file() else f"is not one of {', '.join(BUILDERS)}"
        raise RecipeError(f"the data file {path} {fault}. Check the path.")
    digest = file_sha256(path)
    if asked.sha256 not in (None, digest):
        raise CheckpointError(
            f"{path} has sha256 {digest}, but the recipe expects {asked.sha256}: it holds different examples. "
            "Use the right file, or drop sha256 from the recipe."
        )
    return OpenSet(asked, file=path, sha256=digest)


def _open_repo(asked: LocalizationSet, repo: str, revision: str | None, config: str | None) -> OpenSet:
    from huggingface_hub import HfApi, constants

    from hf_locstitch.checkpoints.hub_client import raise_clearly, retrying

    try:
        info = retrying(lambda: HfApi().dataset_info(repo, revision=revision))
    except Exception as error:
        raise_clearly(error, repo, revision, constants.ENDPOINT)
    return OpenSet(asked, repo=repo, commit=info.sha, config=config)


def read_rows(opened: OpenSet, labels: bool = True) -> list[dict[str, Any]]:
    """The examples, under our names for the columns. labels: whether images without them are refused.

    Raises RequestError if the data has other columns.
    """
    dataset = _load(opened)
    rename, where = dict(opened.asked.columns), opened.asked.where
    if absent := [column for column in [*rename.values(), *where] if column not in dataset.column_names]:
        raise RequestError(
            f"{opened.label} has no column {absent[0]!r}: it has {', '.join(dataset.column_names)}. "
            "Check the data's `columns` and `where` in the recipe."
        )
    for column, allowed in where.items():
        dataset = dataset.select([place for place, value in enumerate(dataset[column]) if value in allowed])
    of_labels = rename.get("label", "label")
    values = dataset[of_labels] if of_labels in dataset.column_names else None
    chosen = choose(values, len(dataset), opened.asked.number, opened.asked.seed)[: opened.asked.limit]
    rows = [dict(row) for row in dataset.select(chosen)]
    known = find_surrogate(opened.asked.ref)
    if known and not rename:
        return [known.row(row, opened.asked.rendering) for row in rows]
    rows = [{**row, **{name: row[column] for name, column in rename.items()}} for row in rows]
    wanted = COLUMNS if labels else (*COLUMNS, ("image",))
    if not rows or not any(all(rows[0].get(name) is not None for name in names) for names in wanted):
        known = "; ".join(" and ".join(names) for names in wanted)
        raise RequestError(
            f"{opened.label} has {len(rows)} examples with the columns {', '.join(dataset.column_names)}; needed "
            "is one of: "
            f"{known}. Map them with the data's `columns` in the recipe."
        )
    rows = [_with_label(row, opened.asked.labels) for row in rows]
    return [_with_image(row, opened.file) for row in rows]


def _load(opened: OpenSet) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    asked = opened.asked
    try:
        if opened.file:
            builder = BUILDERS[opened.file.suffix]
            return datasets.load_dataset(builder, data_files={asked.split: str(opened.file)}, split=asked.split)
        return datasets.load_dataset(str(opened.repo), opened.config, split=asked.split, revision=opened.commit)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:  # RuntimeError: a script, which is never run
        raise RequestError(
            f"{opened.label} cannot be read as a data set ({' '.join(str(error).split())[:300]}). "
            "Check its config and split."
        ) from error


def choose(labels: Sequence[Any] | None, count: int, number: int, seed: int) -> list[int]:
    """Which of `count` rows are used: `number`, or as many of each label, in an order that depends on the seed only."""
    order = random.Random(seed).sample(range(count), count)
    if labels is None:
        return order[:number]
    values = list(labels)
    taken: dict[Any, int] = {}
    chosen = []
    for place in order:
        if taken.get(values[place], 0) < number:
            taken[values[place]] = taken.get(values[place], 0) + 1
            chosen.append(place)
    return chosen


def _with_label(row: dict[str, Any], classes: Mapping[str, int | str]) -> dict[str, Any]:
    """The class that a label stands for, where one is given."""
    return {**row, "label": classes[str(row["label"])]} if str(row.get("label")) in classes else row


def _with_image(row: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Open an image that a file refers to by its path, relative to the file."""
    if file is None or not isinstance(row.get("image"), str):
        return row
    from PIL import Image

    return {**row, "image": Image.open(file.parent / row["image"])}
