"""Small Llamas with real tokenizers, some of which were given more tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(21)))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tokenizer(
    words: Sequence[str] = WORDS, *, special: Sequence[str] = (), plain: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """words: of its own model; special, plain: added to it, in this order."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if special:
        fast.add_special_tokens({"additional_special_tokens": list(special)})  # type: ignore[dict-item]
    fast.add_tokens(list(plain))
    return fast


def model(
    rows: int, *, tied: bool, seed: int = 0, base: LlamaForCausalLM | None = None, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama with so many rows; its other weights those of the base, with a random step."""
    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config)
        if base is not None:
            with torch.no_grad():
                for own, theirs in zip(made.parameters(), base.parameters(), strict=True):
                    count = min(len(own), len(theirs))
                    own[:count] = theirs.detach()[:count] + 0.01 * torch.randn_like(own[:count])
    return made.to(dtype)  # type: ignore[return-value]


def save(
    folder: Path, model: LlamaForCausalLM, tokens: PreTrainedTokenizerFast | None, template: str | None = None
) -> Path:
    model.save_pretrained(folder)
    if tokens is not None:
        tokens.chat_template = template
        tokens.save_pretrained(folder)
    return folder


def family(
    folder: Path, *, tied: bool, rows: Mapping[str, int] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """base; math, which added three tokens and a chat template; chat, which has one of them under another id, where
    math has another, and one of its own. rows: of their matrices, where not one for each token."""
    counts = {"base": 24, "math": 27, "chat": 26, **(rows or {})}
    base = model(counts["base"], tied=tied, dtype=dtype)
    math, chat = (
        model(counts[name], tied=tied, seed=i, base=base, dtype=dtype) for i, name in ((1, "math"), (2, "chat"))
    )
    return {
        "base": save(folder / "base", base, tokenizer()),
        "math": save(folder / "math", math, tokenizer(special=["<|im_start|>", "<|im_end|>"], plain=["sum"]), TEMPLATE),
        "chat": save(folder / "chat", chat, tokenizer(special=["<|tool|>", "<|im_end|>"])),
    }
