"""Classification of images by similarity to the base's embedding of each class description: an untrained head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hf_locstitch.tasks.images import image_tokens, pixels, stack
from hf_locstitch.tasks.objective import RIGHT, Objective, classes_task, label_ids

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task


class ClipZeroShot(Objective):
    """Rows: `image` and `label`. The base's text tower gives the head; the finetune may be a vision tower alone.

    classes: their names, in the order of the labels. prompt: with {} for the name.
    """

    kind: Literal["clip-zero-shot"] = "clip-zero-shot"
    auto_class: ClassVar[str] = "CLIPModel"
    processor: ClassVar[str] = "AutoProcessor"
    base_config: ClassVar[bool] = True
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "base"
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str = "a photo of a {}."

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        return self.preparing(processor, base)(rows)

    def preparing(self, processor: Any, base: Any) -> Callable[[Sequence[dict[str, Any]]], Task]:
        import torch
        from torch.nn.functional import normalize

        texts = [self.prompt.format(name) for name in self.classes]
        with torch.no_grad():
            tokens = processor.tokenizer(texts, padding=True, **RIGHT, return_tensors="pt").to(base.device)
            features = _features(base.get_text_features(**tokens))
            head = normalize(features, dim=-1) * base.logit_scale.exp()  # [classes, features]

        def outputs(model: Any, batch: Sequence[tuple[Any, int]]) -> Tensor:
            seen = normalize(_features(model.get_image_features(pixel_values=stack(batch, model))), dim=-1)
            return seen @ head.to(seen).T

        def task(rows: Sequence[dict[str, Any]]) -> Task:
            images = pixels(rows, processor.image_processor)
            return classes_task(list(zip(images, label_ids(rows, self.classes), strict=True)), outputs)

        return task

    def tokens(self, config: Mapping[str, Any]) -> int:
        return image_tokens(config)


def _features(output: Any) -> Tensor:
    """[examples, features], which transformers wraps in an object since version 5."""
    return getattr(output, "pooler_output", output)


COMPONENT = ClipZeroShot
