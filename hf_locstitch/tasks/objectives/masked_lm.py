"""Classification as filling in a blank: the label word that a masked language model prefers at the mask.

Source: prompt-based finetuning, Gao et al., "Making Pre-trained Language Models Better Few-shot Learners", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.errors import RequestError
from hf_locstitch.tasks.objective import RIGHT, Objective, Training, classes_task, label_ids

if TYPE_CHECKING:
    from hf_locstitch.tasks.task import Task


class MaskedLM(Objective):
    """Rows: `text` (and `text_b`) and `label`. template: with {text}, perhaps {text_b}, and {mask}.

    label_words: one a class, each a single token, with a space before it where the tokenizer has such a token.
    drop_end: whether `text` loses its last character, such as the full stop before a template's question mark.
    lower_b: whether `text_b` begins in lower case. text_tokens, text_b_tokens: at most so many tokens of a text, from
    its beginning. max_length: tokens of a filled-in template; `too_long`: what a longer one loses, the ends of its
    `texts`, the longer one first, or its `start`, as in the authors' code.
    """

    kind: Literal["masked-lm"] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    gives_words: ClassVar[bool] = True
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "model"
    # As in the paper: https://arxiv.org/abs/2408.13656
    training: ClassVar[Training | None] = Training("sgd", 2e-5, 4, 10, BLOCKS.pattern, "the transformer blocks")
    template: str = "{text} It was {mask}."
    label_words: tuple[str, ...] = Field(min_length=2)
    drop_end: bool = False
    lower_b: bool = False
    text_tokens: int | None = Field(default=None, ge=1)
    text_b_tokens: int | None = Field(default=None, ge=1)
    max_length: int = 256
    too_long: Literal["texts", "start"] = "texts"

    @field_validator("template")
    @classmethod
    def _has_places(cls, value: str) -> str:
        if "{text}" not in value or value.count("{mask}") != 1:
            raise ValueError("a template needs {text} and exactly one {mask}")
        return value

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        from hf_locstitch.tasks.logits import logits_at

        words = [self._token(word, processor) for word in self.label_words]
        labels = label_ids(rows, self.label_words)
        examples = [(self._encode(row, processor), label) for row, label in zip(rows, labels, strict=True)]

        def outputs(model: Any, batch: Sequence[tuple[list[int], int]]) -> Any:
            ids = {"input_ids": [ids for ids, _ in batch]}
            tokens = processor.pad(ids, **RIGHT, return_tensors="pt").to(model.device)
            return logits_at(model, tokens["input_ids"] == processor.mask_token_id, **tokens)[:, words]

        return classes_task(examples, outputs)

    def _token(self, word: str, tokenizer: Any) -> int:
        for text in (" " + word, word):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                return ids[0]
        raise RequestError(f"the label word {word!r} is not a single token for this tokenizer. Choose another.")

    def _encode(self, row: dict[str, Any], tokenizer: Any) -> list[int]:
        texts = self._texts(row, tokenizer)
        ids = self._fill(texts, tokenizer)
        while self.too_long == "texts" and len(ids) > self.max_length:  # the longer text gives way
            longer = max(texts, key=lambda name: len(texts[name]))
            keep = len(texts[longer]) * self.max_length // len(ids)
            texts[longer] = texts[longer][: min(keep, len(texts[longer]) - 1)]
            ids = self._fill(texts, tokenizer)
        ids = ids[-self.max_length :]
        if ids.count(tokenizer.mask_token_id) != 1:
            raise RequestError(
                f"the template {self.template!r} does not give exactly one mask token "
                f"for the text {row['text'][:60]!r}."
            )
        return ids

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
        """The texts of a row as the template takes them."""
        first, second = row["text"], row.get("text_b") or ""
        first = first[:-1] if self.drop_end else first
        second = second[:1].lower() + second[1:] if self.lower_b else second
        return {
            "text": _first_tokens(first, self.text_tokens, tokenizer),
            "text_b": _first_tokens(second, self.text_b_tokens, tokenizer),
        }

    def _fill(self, texts: dict[str, str], tokenizer: Any) -> list[int]:
        return tokenizer(self.template.format(**texts, mask=tokenizer.mask_token))["input_ids"]


def _first_tokens(text: str, count: int | None, tokenizer: Any) -> str:
    """As much of a text as its first tokens stand for."""
    if count is None or not text:
        return text
    limit = {"truncation": True, "max_length": count, "return_offsets_mapping": True}
    return text[: tokenizer(text, add_special_tokens=False, **limit)["offset_mapping"][-1][1]]


COMPONENT = MaskedLM
