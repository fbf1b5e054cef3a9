"""Sets of examples, from a file, the Hub, or a named surrogate; and localization sets: a few for each finetune."""

from __future__ import annotations

import csv
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self, TypeVar

from hf_locstitch.checkpoints.ref import REPO_ID, is_written_as_path
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import CheckpointError, RecipeError, RequestError
from hf_locstitch.runtime.human import counted, nearest
from hf_locstitch.tasks.choosing_objectives import AnyObjective
from hf_locstitch.tasks.named_tasks import named_tasks, with_named_task
from hf_locstitch.tasks.rows import Labels, Where, allowed, check_texts, mapped
from hf_locstitch.tasks.splits import ROWS, of_file
from hf_locstitch.tasks.surrogates import SURROGATES, find_surrogate

COUNTED = 1 << 28  # bytes of a file whose rows are counted before the work
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = (("messages",), ("prompt", "completion"), ("image", "label"), ("text", "label"), ("text",))
WITHOUT_LABELS = (*COLUMNS, ("image",))
HEAD = 100  # lines of a JSONL file that tell its columns before the work


class ExampleSet(BaseModel, ABC):
    """ref: alpaca, gsm8k or hotpotqa; or a task of the paper, such as sst2, which gives all fields but `number` and
    `seed`; or a JSONL, JSON, CSV or Parquet file; or a data set org/name[@revision].

    judged: whether models are judged on such sets, and not trained or localized.
    config, split: of the data set; a slice of a split, such as train[:50%], may be one of a file, too. columns: our
    name -> the data's, for `text`, `text_b`, `prompt`, `completion`, `messages`, `image`, `label`. where: column -> the
    values that are taken; other rows are left out. labels: a label of the data -> the class, by number or name.
    rendering: how a surrogate's rows become prompt and completion.
    objective: by the model's architecture unless given. sha256: expected of a local file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judged: ClassVar[bool] = False

    ref: str = Field(min_length=1)
    config: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict)
    where: Where = Field(default_factory=dict)
    labels: Labels = Field(default_factory=dict)
    rendering: str | None = None
    objective: AnyObjective | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        value = {"ref": str(value)} if isinstance(value, str | Path) else value
        return cls.filled(value) if isinstance(value, dict) else value

    @classmethod
    def filled(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields, and those that follow from `ref`."""
        return with_named_task(fields, cls.judged)

    @model_validator(mode="after")
    def _can_render(self) -> Self:
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

    @abstractmethod
    def draw(self, labels: Sequence[Any] | None, count: int) -> Sequence[int]:
        """Which of `count` rows are used, in order. labels: theirs, if they have any."""

    @property
    @abstractmethod
    def amount(self) -> str:
        """How many rows are used, for people."""


class LocalizationSet(ExampleSet):
    """number: of examples, or of examples of each class where there are labels; drawn with `seed`. limit: of examples
    in all. role: how these examples relate to the finetune, for the record."""

    split: str = "train"  # pyright: ignore[reportIncompatibleVariableOverride]
    number: int = Field(default=64, ge=1)
    seed: int = 0
    limit: int | None = Field(default=None, ge=1)
    role: Literal["finetuning", "held-out", "surrogate"] | None = None

    @classmethod
    def filled(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        surrogate = find_surrogate(str(fields.get("ref"))) is not None
        return {"role": "surrogate", **fields} if surrogate else super().filled(fields)

    def draw(self, labels: Sequence[Any] | None, count: int) -> Sequence[int]:
        return choose(labels, count, self.number, self.seed)[: self.limit]

    @property
    def amount(self) -> str:
        role = f", {self.role} data" if self.role else ""
        limit = f", {self.limit} in all" if self.limit else ""
        return f"up to {counted(self.number, 'drawn example')}, or of each class{limit}, seed {self.seed}{role}"


Asked = TypeVar("Asked", bound=ExampleSet, default=LocalizationSet)


@dataclass(frozen=True)
class OpenSet(Generic[Asked]):
    """A set, located and pinned. repo, commit: on the Hub; file, sha256: of a local file."""

    asked: Asked
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
    def pinned(self) -> Asked:
        """A set that requests exactly these examples, without the path of a local file."""
        if self.file:
            return self.asked.model_copy(update={"ref": f"./{self.file.name}", "sha256": self.sha256})
        name = self.asked.ref.partition("@")[0]
        return self.asked.model_copy(update={"ref": f"{name}@{self.commit}"})

    def describe(self) -> str:
        asked = self.asked
        part = f"{self.config}, " if self.config else ""
        return f"{self.label} ({part}{asked.split}, {asked.amount})"


def open_set(asked: Asked) -> OpenSet[Asked]:
    """Locate and pin a set, without reading examples. Raises RecipeError or CheckpointError."""
    name, _, revision = asked.ref.partition("@")
    if (path := Path(asked.ref).expanduser()).is_file() or is_written_as_path(asked.ref):
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


def _open_file(asked: Asked, path: Path) -> OpenSet[Asked]:
    if not path.is_file() or path.suffix not in BUILDERS:
        fault = "does not exist" if not path.is_file() else f"is not one of {', '.join(BUILDERS)}"
        raise RecipeError(f"the data file {path} {fault}. Check the path.")
    if path.stat().st_size == 0:
        raise RecipeError(f"the data file {path} is empty. Check what should have written it.")
    if asked.split is not None and of_file(asked.split) is None:
        raise RecipeError(
            f"the data file {path} has one split, whatever it is called, but split is {asked.split!r}. Drop it, or "
            "give a slice, such as train[:50%]."
        )
    digest = file_sha256(path)
    if asked.sha256 not in (None, digest):
        raise CheckpointError(
            f"{path} has sha256 {digest}, but the recipe expects {asked.sha256}: it holds different examples. "
            "Use the right file, or drop sha256 from the recipe."
        )
    opened = OpenSet(asked, file=path, sha256=digest)
    if (present := columns_of(path)) is not None:
        _check_named(opened, present)
        _check_enough(opened, [*present, *asked.columns])
    return opened


def _open_repo(asked: Asked, repo: str, revision: str | None, config: str | None) -> OpenSet[Asked]:
    from huggingface_hub import HfApi, constants

    from hf_locstitch.checkpoints.hub_client import raise_clearly, retrying

    try:
        info = retrying(lambda: HfApi().dataset_info(repo, revision=revision))
    except Exception as error:
        raise_clearly(error, repo, revision, constants.ENDPOINT)
    return OpenSet(asked, repo=repo, commit=info.sha, config=config)


@dataclass(frozen=True)
class Rows:
    """The rows of a set, each read when it is asked for. data: of datasets, only the rows that are used."""

    opened: OpenSet[Any]
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def part(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rows first … last − 1, under our names for the columns."""
        rows = [dict(row) for row in self.data.select(range(first, last))]
        asked = self.opened.asked
        surrogate = find_surrogate(asked.ref)
        if surrogate and not asked.columns:
            return [surrogate.row(row, asked.rendering) for row in rows]
        rows = [self._row({**row, **{name: row[column] for name, column in asked.columns.items()}}) for row in rows]
        check_texts(rows, first, self.opened.label)
        return rows

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.opened.asked.labels and "label" in row:
            row["label"] = mapped(row["label"], self.opened.asked.labels, self.opened.label)
        return _with_image(row, self.opened.file)


def read_rows(opened: OpenSet[Any], labels: bool = True) -> list[dict[str, Any]]:
    """All rows of a set. Raises as open_rows."""
    rows = open_rows(opened, labels)
    return rows.part(0, len(rows))


def open_rows(opened: OpenSet[Any], labels: bool = True) -> Rows:
    """labels: whether images without them are refused. Raises RequestError if the data has other columns."""
    data, asked = _load(opened), opened.asked
    _check_named(opened, data.column_names)
    if asked.where:
        kept = allowed({name: data[asked.columns.get(name, name)] for name in asked.where}, asked.where)
        data = data.select(kept)
    of_labels = asked.columns.get("label", "label")
    values = list(data[of_labels]) if of_labels in data.column_names else None
    if values is not None and asked.labels:
        values = [mapped(value, asked.labels, opened.label) for value in values]
    rows = Rows(opened, data.select(asked.draw(values, len(data))))
    _check_columns(rows, labels)
    return rows


def columns_of(path: Path) -> list[str] | None:
    """The columns of a local file as its head tells them; None where it does not tell."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        if path.suffix not in (".jsonl", ".csv"):
            return None
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.suffix == ".csv":
                return next(csv.reader(lines), None)
            rows = [json.loads(line) for line in islice(lines, HEAD) if line.strip()]
    except (ValueError, OSError, csv.Error):  # who reads all of it tells what is wrong
        return None
    return list(dict.fromkeys(name for row in rows for name in row)) if rows else None


def _check_named(opened: OpenSet[Any], present: Sequence[str]) -> None:
    """Raises RequestError if a column that is asked for is not present."""
    asked = opened.asked
    named = {"columns": list(asked.columns.values()), "where": [asked.columns.get(name, name) for name in asked.where]}
    for key, columns in named.items():
        if absent := [column for column in columns if column not in present]:
            raise RequestError(
                f"{opened.label} has no column {absent[0]!r}: it has {', '.join(present)}"
                f"{nearest(absent[0], present) or '.'} Check the data's `{key}` in the recipe."
            )


def _check_enough(opened: OpenSet[Any], present: Sequence[str]) -> None:
    """Raises RequestError if no objective takes these columns. present: under our names or the data's."""
    if any(set(names) <= {*present} for names in WITHOUT_LABELS):
        return
    ours = ("prompt", "completion") if len(present) > 1 else ("text",)
    columns = ", ".join(f"{our}: {name}" for our, name in zip(ours, present, strict=False))
    raise RequestError(
        f"{opened.label} has the columns {', '.join(present)}, but needed is one of: "
        f"{'; '.join(' and '.join(names) for names in WITHOUT_LABELS)}. Map them in a recipe, such as "
        f"data: [{{ref: {opened.asked.ref}, columns: {{{columns}}}}}]."
    )


def _check_columns(rows: Rows, labels: bool) -> None:
    """Raises RequestError unless there are rows, with columns that an objective takes."""
    data, opened = rows.data, rows.opened
    if not len(rows) and opened.asked.where:
        raise RequestError(
            f"no row of {opened.label} is left: none has the values of the data's `where`. Check them in the recipe."
        )
    wanted = COLUMNS if labels else WITHOUT_LABELS
    first = rows.part(0, 1)[0] if len(rows) else {}
    if not any(all(first.get(name) is not None for name in names) for names in wanted):
        known = "; ".join(" and ".join(names) for names in wanted)
        raise RequestError(
            f"{opened.label} has {counted(len(rows), 'example')} with the columns {', '.join(data.column_names)}; "
            f"needed is one of: {known}. Map them with the data's `columns` in the recipe."
        )


def _load(opened: OpenSet[Any]) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    asked = opened.asked
    try:
        if opened.file:
            builder = BUILDERS[opened.file.suffix]
            return datasets.load_dataset(builder, data_files={ROWS: str(opened.file)}, split=of_file(asked.split))
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
    values = [label if isinstance(label, Hashable) else str(label) for label in labels]
    taken: dict[Any, int] = {}
    chosen = []
    for place in order:
        if taken.get(values[place], 0) < number:
            taken[values[place]] = taken.get(values[place], 0) + 1
            chosen.append(place)
    return chosen


def _with_image(row: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Open an image that a file refers to by its path, relative to the file."""
    if file is None or not isinstance(row.get("image"), str):
        return row
    from PIL import Image

    return {**row, "image": Image.open(file.parent / row["image"])}
