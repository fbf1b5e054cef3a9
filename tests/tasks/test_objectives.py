"""What the objectives make of a row: which tokens count, under which template, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.families import build, masked_tokenizer

from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.tasks.alpaca import ALPACA
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.objective import class_names, label_ids
from hf_locstitch.tasks.objectives.causal_lm import IGNORED, CausalLM
from hf_locstitch.tasks.objectives.masked_lm import MaskedLM
from hf_locstitch.tasks.objectives.sequence_classification import SequenceClassification

CHAT = (
    "{% for m in messages %}{{ '<s>' if m['role'] == 'user' else '=' }}{{ m['content'] }}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def chatting() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def learned(tokenizer: Any, row: dict[str, Any], objective: CausalLM) -> tuple[str, str]:
    """The whole text, and the part of it that is learned."""
    ids, labels = objective.prepare([row], tokenizer, None).examples[0]
    assert len(ids) == len(labels) and all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    wanted = [label for label in labels if label != IGNORED]
    return tokenizer.decode(ids), tokenizer.decode(wanted)


def test_only_the_answer_is_learned() -> None:
    row = {"prompt": "copy cable=", "completion": "cable"}
    assert learned(make_tokenizer(), row, CausalLM()) == ("<s>copy cable=cable</s>", "cable</s>")


def test_the_alpaca_template_is_for_instructions() -> None:
    class Letters:
        """A tokenizer that turns letters into their numbers."""

        eos_token_id, pad_token_id, chat_template = 0, 0, None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(char) for char in text]}

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    row = {"prompt": "Go.", "completion": "Gone."}
    whole = ALPACA.format(instruction="Go.") + "Gone.\0"
    assert learned(Letters(), {**row, "instruction": "Go."}, CausalLM())[0] == whole
    assert learned(Letters(), row, CausalLM())[0] == "Go.Gone.\0"
    assert learned(Letters(), row, CausalLM(template="alpaca"))[0] == whole
    turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    text, answer = learned(Letters(), {"messages": turns}, CausalLM(template="none"))
    assert (text, answer) == ("Go.Gone.\0", "Gone.\0")
    with_input = {"prompt": "Go.\n\nHome", "completion": "Gone.", "instruction": "Go.", "input": "Home"}
    text, answer = learned(Letters(), with_input, CausalLM())
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert (
        text.endswith("\n\n### Instruction:\nGo.\n\n### Input:\nHome\n\n### Response:Gone.\0") and answer == "Gone.\0"
    )


def test_a_chat_template_wins_and_every_answer_is_learned() -> None:
    turns = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "cba"},
        {"role": "user", "content": "123"},
        {"role": "assistant", "content": "321"},
    ]
    text, answer = learned(chatting(), {"messages": turns}, CausalLM())
    assert text == "<s>abc</s>=cba</s><s>123</s>=321</s>" and answer == "cba</s>321</s>"
    text, answer = learned(chatting(), {"prompt": "abc", "completion": "cba"}, CausalLM())
    assert (text, answer) == ("<s>abc</s>=cba</s>", "cba</s>")


def test_every_token_of_a_text_counts_but_the_first() -> None:
    task = CausalLM().prepare([{"text": "copy cable=cable"}], make_tokenizer(), None)
    ids, labels = task.examples[0]
    assert ids == labels and task.weights == [len(ids) - 1]


def test_examples_that_lose_their_answer_are_left_out() -> None:
    rows = [{"prompt": "copy cable=", "completion": "cable"}, {"prompt": "copy a=", "completion": "a"}]
    task = CausalLM(max_length=5).prepare(rows, make_tokenizer(), None)
    assert len(task.examples) == 1 and task.weights == [1]
    with pytest.raises(RequestError, match="none of the 1 examples"):
        CausalLM(max_length=2).prepare(rows[:1], make_tokenizer(), None)


def test_padding_changes_no_loss() -> None:
    """The loss of a padded batch is the sum of the losses of its examples."""
    model = build("llama")
    rows = [{"prompt": "copy cable=", "completion": "cable"}, {"prompt": "copy a=", "completion": "a"}]
    task = CausalLM().prepare(rows, make_tokenizer(), None)
    together = task.loss(model, task.examples)
    alone = sum(task.loss(model, [example]) for example in task.examples)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_masked_prompts_are_cut_to_length() -> None:
    tokenizer = masked_tokenizer()
    objective = MaskedLM(template="{text}={mask}", label_words=("a", "b"), max_length=8)
    task = objective.prepare([{"text": "abcabcabcabcabc", "label": 1}], tokenizer, None)
    (ids, label), weights = task.examples[0], task.weights
    assert len(ids) <= 8 and ids.count(tokenizer.mask_token_id) == 1 and (label, weights) == (1, [1])


def test_label_words_must_be_tokens() -> None:
    with pytest.raises(RequestError, match="'terrible' is not a single token"):
        MaskedLM(template="{text}{mask}", label_words=("terrible", "a")).prepare([], masked_tokenizer(), None)
    with pytest.raises(ValueError, match="a template needs"):
        MaskedLM(template="{text}", label_words=("a", "b"))


def test_labels_by_name_or_number() -> None:
    rows = [{"label": 1}, {"label": "Yes"}, {"label": "no"}]
    assert label_ids(rows, ["no", "yes"]) == [1, 1, 0]
    with pytest.raises(RequestError, match="'maybe' is not one of the 2 classes"):
        label_ids([{"label": "maybe"}], ["no", "yes"])
    with pytest.raises(RequestError, match="the label 2"):
        label_ids([{"label": 2}], ["no", "yes"])


def test_classes_may_differ_in_case_alone() -> None:
    names = ["us", "US", "Them"]
    assert label_ids([{"label": label} for label in ("US", "us", "them", 1)], names) == [1, 0, 2, 1]
    with pytest.raises(RequestError, match="'Us' is not one of the 3 classes"):
        label_ids([{"label": "Us"}], names)
    config = transformers.BertConfig(id2label={0: "us", 1: "them"}, architectures=["BertForSequenceClassification"])
    SequenceClassification().settle(config, [{"label": label} for label in ("us", "US", "them")])
    assert class_names(config) == ["US", "them", "us"]


def test_the_architecture_suggests_an_objective() -> None:
    for architecture, kind in {
        "LlamaForCausalLM": "causal-lm",
        "GPT2LMHeadModel": "causal-lm",
        "RobertaForSequenceClassification": "sequence-classification",
        "ViTForImageClassification": "image-classification",
    }.items():
        assert suggest({"architectures": [architecture]}, "ft").kind == kind
    with pytest.raises(RecipeError, match="RobertaForMaskedLM"):
        suggest({"architectures": ["RobertaForMaskedLM"]}, "ft")
