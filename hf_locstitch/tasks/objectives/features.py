"""No answers at all: texts, and a model's last hidden states for them. For refits only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.errors import RequestError
from hf_locstitch.tasks.objective import Objective, Training

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task


class Features(Objective):
    """Rows: `text` (and `text_b`), or `prompt` and `completion`. An encoder–decoder is given the completion, or the
    text again, to decode. max_length: tokens of each; longer texts lose their ends.
    """

    kind: Literal["features"] = "features"
    auto_class: ClassVar[str] = "AutoModel"
    labels: ClassVar[str] = "none"
    training: ClassVar[Training | None] = None
    max_length: int = 256

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        from hf_locstitch.tasks.task import Task

        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        decodes = bool(getattr(base.config, "is_encoder_decoder", False))
        pairs = [_texts(row) for row in rows]
        limit = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}

        def outputs(model: Any, batch: Sequence[tuple[str, str | None]]) -> Tensor:
            first, second = [one for one, _ in batch], [other for _, other in batch]
            if not decodes and all(second):
                inputs = dict(processor(first, second, **limit))
            else:
                inputs = dict(processor(first, **limit))
            inside = inputs["attention_mask"]
            if decodes:
                target = processor([other or one for one, other in batch], **limit)
                inside = target["attention_mask"]
                inputs |= {"decoder_input_ids": target["input_ids"], "decoder_attention_mask": inside}
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            hidden = model(**inputs).last_hidden_state  # [texts, tokens, hidden]
            return hidden[inside.to(hidden.device).bool()]

        return Task(pairs, [1] * len(pairs), _no_loss, outputs, logits=False)


def _texts(row: dict[str, Any]) -> tuple[str, str | None]:
    if row.get("text"):
        return row["text"], row.get("text_b")
    return row["prompt"], row["completion"]


def _no_loss(model: Any, batch: Sequence[Any]) -> Tensor:
    raise RequestError("hidden states have no loss: use objective {kind: features} with a refit, not with a localizer.")


COMPONENT = Features
