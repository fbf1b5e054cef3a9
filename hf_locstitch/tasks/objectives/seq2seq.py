"""Encoder–decoders for text: the loss of an answer's tokens, given the prompt in the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.errors import RequestError
from hf_locstitch.tasks.alpaca import alpaca_prompt
from hf_locstitch.tasks.objective import NoAnswers, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task

Encoded = tuple[list[int], list[int], list[int]]  # token ids of the encoder and of the decoder, and what it is to say


class Seq2Seq(Objective):
    """Rows: `prompt` and `completion`, or `messages`, whose last one is the answer, or `text`, to be said again.

    template: how a prompt is formatted. "auto": the tokenizer's chat template if it has one, else none. max_length:
    tokens of the prompt, and of the answer; longer ones lose their ends.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    gives_words: ClassVar[bool] = True
    labels: ClassVar[str] = "text"
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "model"
    hub_task: ClassVar[str] = "text2text-generation"
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    max_length: int = 512

    @classmethod
    def suits(cls, config: Mapping[str, Any]) -> bool:
        """Those of text only: others read pictures or sounds."""
        if not config.get("is_encoder_decoder"):
            return False
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as NAMES

        return architecture(config) in NAMES.values()

    def tokens(self, config: Mapping[str, Any]) -> int:
        return 2 * self.max_length

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        from hf_locstitch.tasks.task import Task

        encoded = [self._encode(*self._texts(row, processor), processor, base) for row in rows]
        encoded = [example for example in encoded if example[0] and example[2]]
        if not encoded:
            raise NoAnswers(f"none of the {len(rows)} examples has a prompt and an answer. Check the columns.")
        padding = processor.pad_token_id if processor.pad_token_id is not None else 0
        return Task(
            encoded,
            [len(answer) for _, _, answer in encoded],
            lambda model, batch: answer_loss(model, batch, padding),
            lambda model, batch: answer_logits(model, batch, padding),
            targets=lambda batch: [token for _, _, answer in batch for token in answer],
        )

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
        """Prompt, as it is formatted, and answer."""
        if "text" in row:
            return row["text"], row["text"]
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}, {"content": row["completion"]}]
        asked, answer = list(messages[:-1]), messages[-1]["content"]
        if self.template == "chat" or (self.template == "auto" and bool(tokenizer.chat_template)):
            return tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False), answer
        prompt = "\n\n".join(turn["content"] for turn in asked)
        return alpaca_prompt({"prompt": prompt, **row}) if self.template == "alpaca" else prompt, answer

    def _encode(self, prompt: str, answer: str, tokenizer: Any, model: Any) -> Encoded:
        """As in training by transformers: the answer is tokenized as a target, and shifted for the decoder."""
        limit = {"truncation": True, "max_length": self.max_length}
        ids = tokenizer(prompt, **limit)["input_ids"]
        wanted = tokenizer(text_target=answer, **limit)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and end not in wanted and len(wanted) < self.max_length:
            wanted = [*wanted, end]
        return ids, shifted(wanted, model), wanted


def shifted(wanted: Sequence[int], model: Any) -> list[int]:
    """The decoder's inputs, of as many tokens, for what it is to say. Raises RequestError."""
    import torch

    start = getattr(model.config, "decoder_start_token_id", None)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        try:
            return model.prepare_decoder_input_ids_from_labels(torch.tensor([list(wanted)]))[0].tolist()
        except (ValueError, AttributeError):  # whose words depend on the architecture
            start = None
    if start is None:
        raise RequestError(
            "the model's config.json does not say with which token its decoder begins: decoder_start_token_id is "
            "missing. Add it, as in the model's own generation_config.json or its documentation."
        )
    return [start, *wanted[:-1]]


def answer_loss(model: Any, batch: Sequence[Encoded], padding: int) -> Tensor:
    """Cross entropy summed over the answers' tokens. Returns a scalar."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = answer_logits(model, batch, padding)
    wanted = torch.tensor([token for _, _, answer in batch for token in answer], device=logits.device)
    return cross_entropy(logits, wanted, reduction="sum")


def answer_logits(model: Any, batch: Sequence[Encoded], padding: int) -> Tensor:
    """Logits of the answers' tokens, [tokens, vocabulary], of a batch that is padded on the right."""
    import torch

    from hf_locstitch.tasks.logits import logits_at

    ids, inside = padded([given for given, _, _ in batch], padding)
    decoder_ids, answered = padded([given for _, given, _ in batch], padding)
    inputs = {"input_ids": ids, "attention_mask": inside, "decoder_input_ids": decoder_ids,
              "decoder_attention_mask": answered}  # fmt: skip
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = logits_at(model, inputs["decoder_attention_mask"].bool(), **inputs, use_cache=False)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def padded(sequences: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """int64 [sequences, longest], and where there are tokens of theirs (1, else 0)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(list(one), dtype=torch.int64) for one in sequences]
    whole = pad_sequence(rows, batch_first=True, padding_value=padding)
    return whole, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


COMPONENT = Seq2Seq
