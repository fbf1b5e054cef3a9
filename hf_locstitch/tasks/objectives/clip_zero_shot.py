"""Classification of images by similarity to the base's embedding of each class description: an untrained head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hf_locstitch.tasks.images import image_tokens, pixels, stack
from hf_locstitch.tasks.objective import Objective, classes_task, label_ids

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
    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str = "a photo of a {}."

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

    def tokens(self, config: Mapping[str, Any]) -> int:
        return image_tokens(config)


def _features(output: Any) -> Tensor:
    """[examples, features], which transformers wraps in an object since version 5."""
    return getattr(output, "pooler_output", output)


COMPONENT = ClipZeroShot
