"""Classification with a head that the finetune brings: of texts, and of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from hf_locstitch.data.config import ObjectiveConfig, classes_task, label_ids

if TYPE_CHECKING:
    from hf_locstitch.data.task import Task


def class_names(config: Any) -> list[str]:
    """Of a classification model, in order."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


class SequenceClassification(ObjectiveConfig):
    """Rows: `text` (and `text_b`) and `label`, a number or a name that the finetune's config has."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    max_length: int = 256

    @property
    def auto_class(self) -> str:
        return "AutoModelForSequenceClassification"

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        labels = label_ids(rows, class_names(base.config))
        texts = [(row["text"], row["text_b"]) if row.get("text_b") else (row["text"],) for row in rows]
        encoded = [dict(processor(*text, truncation=True, max_length=self.max_length)) for text in texts]
        examples = list(zip(encoded, labels, strict=True))

        def outputs(model: Any, batch: Sequence[tuple[dict[str, Any], int]]) -> Any:
            inputs = processor.pad([tokens for tokens, _ in batch], return_tensors="pt").to(model.device)
            return model(**inputs).logits

        return classes_task(examples, outputs)


class ImageClassification(ObjectiveConfig):
    """Rows: `image` and `label`, a number or a name that the finetune's config has."""

    kind: Literal["image-classification"] = "image-classification"

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageClassification"

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        examples = list(zip(pixels(rows, processor), label_ids(rows, class_names(base.config)), strict=True))

        return classes_task(examples, lambda model, batch: model(pixel_values=stack(batch, model)).logits)


def pixels(rows: Sequence[dict[str, Any]], processor: Any) -> list[Any]:
    """float32 [channels, height, width] of each row's image."""
    images = [row["image"].convert("RGB") for row in rows]
    return [processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]


def stack(batch: Sequence[tuple[Any, int]], model: Any) -> Any:
    """Pixels of a batch [examples, channels, height, width], where the model is and in its dtype."""
    import torch

    return torch.stack([image for image, _ in batch]).to(model.device, model.dtype)
