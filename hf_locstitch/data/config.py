"""What the configurations of all objectives share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.data.task import Task


class ObjectiveConfig(BaseModel):
    """base_config: whether the base's config.json describes the model, else the finetune's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def base_config(self) -> bool:
        return False


def class_loss(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Cross entropy summed over examples, in float32 at least. logits: [examples, classes]. Returns a scalar."""
    import torch
    from torch.nn.functional import cross_entropy

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, torch.tensor(labels, device=logits.device), reduction="sum")


def classes_task(examples: Sequence[tuple[Any, int]], outputs: Callable[[Any, Sequence[Any]], Tensor]) -> Task:
    """A task of (input, label) examples. outputs: (model, examples) -> logits [examples, classes]."""
    from hf_locstitch.data.task import Task

    def loss(model: Any, batch: Sequence[tuple[Any, int]]) -> Tensor:
        return class_loss(outputs(model, batch), [label for _, label in batch])

    return Task(examples, [1] * len(examples), loss, outputs, targets=lambda batch: [label for _, label in batch])


def label_ids(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[int]:
    """Class numbers of rows whose `label` is a number or one of the names. Raises RequestError."""
    from hf_locstitch.errors import RequestError

    numbers = {name.lower(): number for number, name in enumerate(names)}
    found = []
    for row in rows:
        label = row["label"]
        number = numbers.get(label.lower(), -1) if isinstance(label, str) else int(label)
        if not 0 <= number < len(names):
            raise RequestError(
                f"the label {label!r} is none of the {len(names)} classes ({', '.join(names[:6])}). "
                "Map the labels in the data, or name the classes."
            )
        found.append(number)
    return found
