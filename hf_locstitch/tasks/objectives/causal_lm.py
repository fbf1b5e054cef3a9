"""Language modelling on answers only: the loss of a completion's tokens, given its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.tasks.alpaca import alpaca_prompt
from hf_locstitch.tasks.objective import NoAnswers, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.tasks.task import Task

IGNORED = -100  # label of a token without a loss
Encoded = tuple[list[int], list[int]]  # token ids and labels of one example


class CausalLM(Objective):
    """Rows: `messages`, or `prompt` and `completion`, or `text` (then every token counts).

    template: how a prompt is formatted. "auto": the tokenizer's chat template if it has one, else Alpaca's (preamble,
    instruction, and input if there is one) for conversations and instructions, else none. max_length: tokens; longer
    examples lose their end.
    """

    kind: Literal["causal-lm"] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    architectures: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    gives_words: ClassVar[bool] = True
    labels: ClassVar[str] = "text"
    head_of: ClassVar[Literal["finetune", "base", "model"]] = "model"
    hub_task: ClassVar[str] = "text-generation"
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    max_length: int = 512

    def prepare(self, rows: Sequence[dict[str, Any]], processor: Any, base: Any) -> Task:
        from hf_locstitch.tasks.task import Task

        encoded = [self._encode(row, processor) for row in rows]
        encoded = [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in encoded]
        encoded = [(ids, labels) for ids, labels in encoded if _count(labels)]
        if not encoded:
            raise NoAnswers(
                f"none of the {len(rows)} examples has an answer token among its first {self.max_length} tokens. "
                "Raise max_length, or check the columns."
            )
        padding = processor.pad_token_id if processor.pad_token_id is not None else 0
        return Task(
            encoded,
            [_count(labels) for _, labels in encoded],
            lambda model, batch: answer_loss(model, batch, padding),
            lambda model, batch: answer_logits(model, batch, padding)[0],
            targets=lambda batch: [label for _, labels in batch for label in labels[1:] if label != IGNORED],
        )

    def _encode(self, row: dict[str, Any], tokenizer: Any) -> Encoded:
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
            return ids, list(ids)
        chat = self.template == "chat" or (self.template == "auto" and bool(tokenizer.chat_template))
        messages = row.get("messages")
        if chat:
            return _encode_chat(messages or _turns(row), tokenizer)
        if messages is not None:
            prompt = "\n\n".join(turn["content"] for turn in messages[:-1])
            row = {"prompt": prompt, "completion": messages[-1]["content"], "instruction": prompt}
        instruct = self.template == "alpaca" or (self.template == "auto" and row.get("instruction"))
        return _encode_plain(alpaca_prompt(row) if instruct else row["prompt"], row["completion"], tokenizer)


def _encode_plain(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    """The prompt as the tokenizer begins a text, the completion after it, and the end of the text."""
    start = tokenizer(prompt)["input_ids"]
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    answer = [*tokenizer(completion, add_special_tokens=False)["input_ids"], *end]
    return [*start, *answer], [*([IGNORED] * len(start)), *answer]


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _encode_chat(messages: Sequence[dict[str, str]], tokenizer: Any) -> Encoded:
    """A conversation under the tokenizer's chat template; the assistant's turns are learned, with their end tokens."""

    def tokens(count: int, *, asks: bool) -> list[int]:
        turns = list(messages[:count])
        return tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=True)["input_ids"]

    ids = tokens(len(messages), asks=False)
    labels = [IGNORED] * len(ids)
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before, until = tokens(number, asks=True), tokens(number + 1, asks=False)
            last = _common(until, ids)
            first = min(_common(before, ids), last)
            labels[first:last] = ids[first:last]
    return ids, labels


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _count(labels: Sequence[int]) -> int:
    """Number of tokens with a loss; the first token of a text is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def answer_loss(model: Any, batch: Sequence[Encoded], padding: int) -> Tensor:
    """Cross entropy summed over the labelled tokens of a batch. Returns a scalar."""
    from torch.nn.functional import cross_entropy

    chosen, wanted = answer_logits(model, batch, padding)
    return cross_entropy(chosen, wanted, reduction="sum")


def answer_logits(model: Any, batch: Sequence[Encoded], padding: int) -> tuple[Tensor, Tensor]:
    """Logits of a batch, padded on the right, that predict labelled tokens, [labelled tokens, vocabulary], and these
    tokens."""
    import torch

    from hf_locstitch.tasks.logits import logits_at

    longest = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), longest), padding)
    labels = torch.full((len(batch), longest), IGNORED)
    inside = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, (ids, wanted) in enumerate(batch):
        tokens[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(wanted)
        inside[row, : len(ids)] = 1
    device = model.device
    due = labels[:, 1:] != IGNORED
    before = torch.nn.functional.pad(due, (0, 1)).to(device)  # the tokens that these follow
    logits = logits_at(model, before, input_ids=tokens.to(device), attention_mask=inside.to(device), use_cache=False)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:][due].to(device)


COMPONENT = CausalLM
