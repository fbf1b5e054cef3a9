"""The objective interface: what a model computes on examples, and sizes to estimate its memory from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task


@dataclass(frozen=True)
class Training:
    """How a model is finetuned for an objective unless the request says otherwise.

    trained: a regular expression; parameters in whose names nothing matches it stay the base's. what: it means.
    """

    optimizer: str = "adamw_torch"
    lr: float = 2e-5
    batch: int = 8
    epochs: int = 3
    trained: str = ""
    what: str = "all parameters"


class Objective(BaseModel, ABC):
    """An objective of your own is one subclass in one file, with a field `kind: Literal["its name"]`.

    auto_class, processor: transformers classes that load the model and its tokenizer or image processor. architectures:
    name endings of the architectures that it is the default for. base_config: whether the base's config.json describes
    the model, else the finetune's. gives_words: whether its logits are over a vocabulary. labels: whether rows need a
    `label` to be scored against, or the text itself is the answer, or there is no right answer. head_of: whose head
    judges a merge unless the data says: the finetune's whose name the data has, the base's, or the model's own.
    hub_task: what the Hub calls such a task. training: how a model is finetuned by default; None where there is no
    loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    auto_class: ClassVar[str]
    processor: ClassVar[str] = "AutoTokenizer"
    architectures: ClassVar[tuple[str, ...]] = ()
    base_config: ClassVar[bool] = False
    gives_words: ClassVar[bool] = False
    labels: ClassVar[str] = "rows"  # "rows", "text" or "none"
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "finetune"
    hub_task: ClassVar[str] = "text-classification"
    training: ClassVar[Training | None] = Training()

    if TYPE_CHECKING:  # a field of each objective, a Literal
        kind: Any = None

    @classmethod
    def suits(cls, config: Mapping[str, Any]) -> bool:
        """Whether it is the default for a finetune with this config.json."""
        return bool(cls.architectures) and architecture(config).endswith(cls.architectures)

    @abstractmethod
    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        """rows: as the data set gives them. base: the base model, for whatever depends on it. Raises RequestError."""

    def preparing(self, processor: Any, base: Any) -> Callable[[Sequence[dict[str, Any]]], Task]:
        """`prepare` for the parts of a set that is too large for memory: what they share is computed once."""
        return partial(self.prepare, processor=processor, base=base)

    def settle(self, config: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Give the config of a model that is to be trained on these rows what it lacks, such as an output a class."""

    def tokens(self, config: Mapping[str, Any]) -> int:
        """Most tokens of an example. config: the base's config.json."""
        return getattr(self, "max_length", 512)

    def class_count(self, config: Mapping[str, Any]) -> int:
        """Number of classes in the examples; 1 if there are no labels. config: the finetune's."""
        return len(getattr(self, "classes", None) or getattr(self, "label_words", None) or (0,))


class NoAnswers(RequestError):
    """None of the rows has an answer that a model could be scored against."""


class OwnClasses(Objective):
    """An objective whose classes are those of the finetune's config.json."""

    def class_count(self, config: Mapping[str, Any]) -> int:
        return len(config.get("id2label") or (0, 1))

    def settle(self, config: Any, rows: Sequence[dict[str, Any]]) -> None:
        """The labels' own names, in alphabetical order, or as many classes as their numbers say; unless the model is a
        classifier that has them already."""
        labels: list[Any] = [row.get("label") for row in rows]
        if None in labels:
            raise RequestError(f"{self.kind} needs a label in every example. Map one with the data's `columns`.")
        named = isinstance(labels[0], str)
        if odd := [label for label in labels if isinstance(label, str) != named or not (named or _is_number(label))]:
            raise RequestError(
                f"the label {odd[0]!r} is no class beside {labels[0]!r}: labels are either names, or whole numbers "
                "from 0 on. Map them in the data (`labels`)."
            )
        found: set[Any] = set(labels)
        if self.suits(config.to_dict()) and _classes_of(found, class_names(config)):
            return
        names = sorted(found) if named else None
        if not named and max(found) >= CLASSES:
            raise RequestError(
                f"the label {max(found)} is too large for the number of a class, which are counted from 0: is it the "
                "right column? Map another with the data's `columns`, or its labels with `labels`."
            )
        config.id2label = dict(enumerate(names or [f"LABEL_{number}" for number in range(max(map(int, found)) + 1)]))
        config.label2id = {name: number for number, name in config.id2label.items()}


CLASSES = 100_000  # that are numbered at most
RIGHT = {"padding_side": "right"}  # of texts in a batch: positions, and so outputs, are then as of each alone


def class_loss(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Cross entropy summed over examples, in float32 at least. logits: [examples, classes]. Returns a scalar."""
    import torch
    from torch.nn.functional import cross_entropy

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, torch.tensor(labels, device=logits.device), reduction="sum")


def classes_task(examples: Sequence[tuple[Any, int]], outputs: Callable[[Any, Sequence[Any]], Tensor]) -> Task:
    """A task of (input, label) examples. outputs: (model, examples) -> logits [examples, classes]."""
    from hf_locstitch.tasks.task import Task

    def loss(model: Any, batch: Sequence[tuple[Any, int]]) -> Tensor:
        return class_loss(outputs(model, batch), [label for _, label in batch])

    return Task(examples, [1] * len(examples), loss, outputs, targets=lambda batch: [label for _, label in batch])


def label_ids(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[int]:
    """Class numbers of rows whose `label` is a number or one of the names. Raises RequestError."""
    number_of = _numbering(names)
    ids = []
    for row in rows:
        label = row["label"]
        number = number_of(label)
        if number is None:
            raise RequestError(
                f"the label {label!r} is not one of the {len(names)} classes ({', '.join(names[:6])}). "
                + ("Data sets hide the labels of their test split so: use another `split`, or " if label == -1 else "")
                + "map the labels in the data (`labels`, `where`), or set the classes."
            )
        ids.append(number)
    return ids


def _is_number(label: Any) -> bool:
    """Whether it is a whole number, which 1.0 and True are, too."""
    return isinstance(label, int | float) and float(label).is_integer()


def _numbering(names: Sequence[str]) -> Callable[[Any], int | None]:
    """A function from a label to the number of its class, None if it is none: a number, or a name, in whichever case
    where no other class has it in another."""
    exact = {name: number for number, name in enumerate(names)}
    counts = Counter(name.lower() for name in names)
    alone = {name.lower(): number for name, number in exact.items() if counts[name.lower()] == 1}

    def number_of(label: Any) -> int | None:
        if isinstance(label, str):
            return exact.get(label, alone.get(label.lower()))
        return int(label) if _is_number(label) and 0 <= label < len(names) else None

    return number_of


def _classes_of(labels: Collection[Any], names: Sequence[str]) -> bool:
    """Whether all labels are among these classes, and no two are the same one. labels: without repetition."""
    numbers = set(map(_numbering(names), labels))
    return None not in numbers and len(numbers) == len(labels)


def class_names(config: Any) -> list[str]:
    """Class names of a classification model, in order."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)]
