"""Logits of chosen tokens are those that the whole model gives there, and no others are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import TEXT
from helpers.families import LLAMA, build

from hf_locstitch.tasks.logits import logits_at

HEADS: dict[str, Any] = {
    "soft-capped": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "not called": ("MobileBertForMaskedLM", "MobileBertConfig", {
        **TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
}  # fmt: skip


def make(kind: str) -> Any:
    if kind not in HEADS:
        return build(kind)
    name, config_class, fields = HEADS[kind]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config_class)(**fields)).double().eval()


def some_tokens(seed: int, examples: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A padded batch, and which of its tokens are chosen."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (examples, 9), generator=drawn)
    inside = (torch.arange(9) < torch.randint(5, 10, (examples, 1), generator=drawn)).long()
    chosen = (torch.rand(ids.shape, generator=drawn) < 0.4) & inside.bool()
    chosen[0, 2] = True
    return {"input_ids": ids, "attention_mask": inside}, chosen


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "roberta-mlm", *HEADS])
@pytest.mark.parametrize("examples", [1, 3])
def test_they_are_the_whole_models(kind: str, examples: int) -> None:
    model = make(kind)
    inputs, chosen = some_tokens(examples, examples)
    whole = model(**inputs).logits[chosen]
    made: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: made.append(out.shape[:-1].numel()))
    found = logits_at(model, chosen, **inputs)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    assert made == ([] if kind == "not called" else [int(chosen.sum())])
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), parameters, allow_unused=True)
                            for x in (found, whole)), strict=True):  # fmt: skip
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_model_itself_stays_as_it_was() -> None:
    model = make("llama")
    inputs, chosen = some_tokens(0)
    before, names = model(**inputs).logits, list(model.state_dict())
    for _ in range(3):
        logits_at(model, chosen, **inputs)
    assert torch.equal(model(**inputs).logits, before) and list(model.state_dict()) == names
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1


def test_threads_share_a_model() -> None:
    model = make("gpt2")
    asked = [some_tokens(seed) for seed in range(24)]

    def find(one: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return logits_at(model, one[1], **one[0])

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(find, asked))
    for (inputs, chosen), logits in zip(asked, found, strict=True):
        torch.testing.assert_close(logits, model(**inputs).logits[chosen], rtol=1e-10, atol=1e-10)
