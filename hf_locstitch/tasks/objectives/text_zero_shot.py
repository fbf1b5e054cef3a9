"""Classification of texts by similarity to the base's embedding of each class description: an untrained head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hf_locstitch.tasks.objective import RIGHT, Objective, classes_task, label_ids

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task


class TextZeroShot(Objective):
    """Rows: `text` and `label`. For sentence encoders: the mean of a text's last hidden states, of length 1.

    classes: descriptions, in the order of the labels. The head is the base's embeddings of them, minus their mean.
    temperature: divisor of the similarity.
    """

    kind: Literal["text-zero-shot"] = "text-zero-shot"
    auto_class: ClassVar[str] = "AutoModel"
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "base"
    hub_task: ClassVar[str] = "zero-shot-classification"
    classes: tuple[str, ...] = Field(min_length=2)
    temperature: float = Field(default=0.1, gt=0)
    max_length: int = 128

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        return self.preparing(processor, base)(rows)

    def preparing(self, processor: Any, base: Any) -> Callable[[Sequence[dict[str, Any]]], Task]:
        import torch
        from torch.nn.functional import normalize

        with torch.no_grad():
            meant = self._embed(base, processor, self.classes)
            head = normalize(meant - meant.mean(0), dim=-1)  # [classes, hidden]

        def outputs(model: Any, batch: Sequence[tuple[str, int]]) -> Tensor:
            seen = self._embed(model, processor, [text for text, _ in batch])
            return seen @ head.to(seen).T / self.temperature

        def task(rows: Sequence[dict[str, Any]]) -> Task:
            texts = [row["text"] for row in rows]
            return classes_task(list(zip(texts, label_ids(rows, self.classes), strict=True)), outputs)

        return task

    def _embed(self, model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        from torch.nn.functional import normalize

        limit = {"padding": True, "truncation": True, "max_length": self.max_length, **RIGHT}
        batch = tokenizer(list(texts), **limit, return_tensors="pt").to(model.device)
        hidden = model(**batch).last_hidden_state  # [texts, tokens, hidden]
        inside = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * inside).sum(1) / inside.sum(1), dim=-1)


COMPONENT = TextZeroShot
