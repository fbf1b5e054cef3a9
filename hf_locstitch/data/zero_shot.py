"""Classification by likeness to what the base makes of a description of each class: a head that nobody trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hf_locstitch.data.classification import pixels, stack
from hf_locstitch.data.config import ObjectiveConfig, classes_task, label_ids

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.data.task import Task


class ClipZeroShot(ObjectiveConfig):
    """Rows: `image` and `label`. The base's text tower gives the head; the finetune may be a vision tower alone.

    classes: their names, in the order of the labels. prompt: with {} for the name.
    """

    kind: Literal["clip-zero-shot"] = "clip-zero-shot"
    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str = "a photo of a {}."

    @property
    def auto_class(self) -> str:
        return "CLIPModel"

    @property
    def base_config(self) -> bool:
        return True

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        import torch
        from torch.nn.functional import normalize

        texts = [self.prompt.format(name) for name in self.classes]
        with torch.no_grad():
            tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
            features = _features(base.get_text_features(**tokens))
            head = normalize(features, dim=-1) * base.logit_scale.exp()  # [classes, features]
        examples = list(zip(pixels(rows, processor.image_processor), label_ids(rows, self.classes), strict=True))

        def outputs(model: Any, batch: Sequence[tuple[Any, int]]) -> Tensor:
            seen = normalize(_features(model.get_image_features(pixel_values=stack(batch, model))), dim=-1)
            return seen @ head.to(seen).T

        return classes_task(examples, outputs)


def _features(output: Any) -> Tensor:
    """[examples, features], which transformers wraps since version 5."""
    return getattr(output, "pooler_output", output)


class TextZeroShot(ObjectiveConfig):
    """Rows: `text` and `label`. For sentence encoders: the mean of a text's last hidden states, of length 1.

    classes: descriptions, in the order of the labels. The head is what the base makes of them, less their mean.
    temperature: what likeness is divided by.
    """

    kind: Literal["text-zero-shot"] = "text-zero-shot"
    classes: tuple[str, ...] = Field(min_length=2)
    temperature: float = Field(default=0.1, gt=0)
    max_length: int = 128

    @property
    def auto_class(self) -> str:
        return "AutoModel"

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        import torch
        from torch.nn.functional import normalize

        with torch.no_grad():
            meant = self._embed(base, processor, self.classes)
            head = normalize(meant - meant.mean(0), dim=-1)  # [classes, hidden]
        texts = [row["text"] for row in rows]
        examples = list(zip(texts, label_ids(rows, self.classes), strict=True))

        def outputs(model: Any, batch: Sequence[tuple[str, int]]) -> Tensor:
            seen = self._embed(model, processor, [text for text, _ in batch])
            return seen @ head.to(seen).T / self.temperature

        return classes_task(examples, outputs)

    def _embed(self, model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        from torch.nn.functional import normalize

        limit = {"padding": True, "truncation": True, "max_length": self.max_length}
        batch = tokenizer(list(texts), **limit, return_tensors="pt").to(model.device)
        hidden = model(**batch).last_hidden_state  # [texts, tokens, hidden]
        inside = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * inside).sum(1) / inside.sum(1), dim=-1)
