"""Classification of texts with a head that the finetune brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.tasks.objective import RIGHT, OwnClasses, class_names, classes_task, label_ids

if TYPE_CHECKING:
    from hf_locstitch.tasks.task import Task


class SequenceClassification(OwnClasses):
    """Rows: `text` (and `text_b`) and `label`, a number or a name that the finetune's config has."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    architectures: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)
    max_length: int = 256

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        labels = label_ids(rows, class_names(base.config))
        texts = [(row["text"], row["text_b"]) if row.get("text_b") else (row["text"],) for row in rows]
        encoded = [dict(processor(*text, truncation=True, max_length=self.max_length)) for text in texts]
        examples = list(zip(encoded, labels, strict=True))

        def outputs(model: Any, batch: Sequence[tuple[dict[str, Any], int]]) -> Any:
            # A decoder classifies the last token that is not this one.
            model.config.get_text_config().pad_token_id = processor.pad_token_id
            inputs = processor.pad([tokens for tokens, _ in batch], **RIGHT, return_tensors="pt").to(model.device)
            return model(**inputs).logits

        return classes_task(examples, outputs)


COMPONENT = SequenceClassification
