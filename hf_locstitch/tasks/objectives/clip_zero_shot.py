"""Classification of images by similarity to the base's embedding of each class description: an untrained head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hf_locstitch.errors import RequestError
from hf_locstitch.tasks.images import image_tokens, pixels, stack
from hf_locstitch.tasks.objective import RIGHT, Objective, Training, classes_task, label_ids

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task


class ClipZeroShot(Objective):
    """Rows: `image` and `label`. The base's text tower gives the head; the finetune may be a vision tower alone.

    classes: their names, in the order of the labels. prompt: with {} for the name; or several, whose embeddings are
    averaged (prompt ensembling, as in CLIP's paper).
    """

    kind: Literal["clip-zero-shot"] = "clip-zero-shot"
    auto_class: ClassVar[str] = "CLIPModel"
    processor: ClassVar[str] = "AutoProcessor"
    base_config: ClassVar[bool] = True
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "base"
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    # Learning rate and batch: https://arxiv.org/abs/2212.04089, whose finetunes the paper merges.
    training: ClassVar[Training | None] = Training(
        "adamw_torch", 1e-5, 128, 10, r"^vision_model\.", "the vision tower; the head is the base's text tower"
    )
    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str | tuple[str, ...] = "a photo of a {}."

    @field_validator("prompt")
    @classmethod
    def _has_place(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value == () or any("{}" not in prompt for prompt in _each(value)):
            raise ValueError("a prompt needs {} for the name of the class")
        return value

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        return self.preparing(processor, base)(rows)

    def preparing(self, processor: Any, base: Any) -> Callable[[Sequence[dict[str, Any]]], Task]:
        import torch
        from torch.nn.functional import normalize

        with torch.no_grad():
            heads = [self._head(prompt, processor.tokenizer, base) for prompt in _each(self.prompt)]
            head = heads[0] if len(heads) == 1 else normalize(torch.stack(heads).mean(0), dim=-1)
            head = head * base.logit_scale.exp()  # [classes, features]

        def outputs(model: Any, batch: Sequence[tuple[Any, int]]) -> Tensor:
            seen = normalize(_features(model.get_image_features(pixel_values=stack(batch, model))), dim=-1)
            return seen @ head.to(seen).T

        def task(rows: Sequence[dict[str, Any]]) -> Task:
            images = pixels(rows, processor.image_processor)
            return classes_task(list(zip(images, label_ids(rows, self.classes), strict=True)), outputs)

        return task

    def _head(self, prompt: str, tokenizer: Any, base: Any) -> Tensor:
        """Embeddings of the classes under one prompt, of length 1 [classes, features]."""
        from torch.nn.functional import normalize

        texts = [prompt.replace("{}", name) for name in self.classes]
        tokens = tokenizer(texts, padding=True, **RIGHT, return_tensors="pt").to(base.device)
        length, count = tokens["input_ids"].shape[1], base.config.get_text_config().max_position_embeddings
        if length > count:
            longest = max(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
            raise RequestError(
                f"{longest!r} has {length} tokens, but the base's text tower has positions for {count} only. Shorten "
                "the objective's `prompt`, or the name of the class in `classes`."
            )
        return normalize(_features(base.get_text_features(**tokens)), dim=-1)

    def tokens(self, config: Mapping[str, Any]) -> int:
        return image_tokens(config)


def _features(output: Any) -> Tensor:
    """[examples, features], which transformers wraps in an object since version 5."""
    return getattr(output, "pooler_output", output)


def _each(prompt: str | tuple[str, ...]) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else prompt


COMPONENT = ClipZeroShot
