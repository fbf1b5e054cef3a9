"""Classification of images with a head that the finetune brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.tasks.images import image_tokens, pixels, stack
from hf_locstitch.tasks.objective import OwnClasses, class_names, classes_task, label_ids

if TYPE_CHECKING:
    from hf_locstitch.tasks.task import Task


class ImageClassification(OwnClasses):
    """Rows: `image` and `label`, a number or a name that the finetune's config has."""

    kind: Literal["image-classification"] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    processor: ClassVar[str] = "AutoImageProcessor"
    architectures: ClassVar[tuple[str, ...]] = ("ForImageClassification",)
    hub_task: ClassVar[str] = "image-classification"

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        examples = list(zip(pixels(rows, processor), label_ids(rows, class_names(base.config)), strict=True))

        return classes_task(examples, lambda model, batch: model(pixel_values=stack(batch, model)).logits)

    def tokens(self, config: Mapping[str, Any]) -> int:
        return image_tokens(config)


COMPONENT = ImageClassification
