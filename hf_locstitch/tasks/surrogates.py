"""Data sets that stand in for a skill, as the paper uses them for language models, so that no benchmark leaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Surrogate:
    """row: from the data set's columns to prompt and completion. judged_on: the paper's benchmark for the skill."""

    repo: str
    config: str | None
    row: Callable[[Row], Row]
    judged_on: str


def _instruction(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion, "instruction": True}


def _alpaca(row: Row) -> Row:
    asked = row["instruction"]
    return _instruction(f"{asked}\n\n{row['input']}" if row["input"] else asked, row["output"])


def _hotpotqa(row: Row) -> Row:
    """The question after the paragraphs that support its answer; all ten would leave no room."""
    wanted = set(row["supporting_facts"]["title"])
    context = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
    facts = ["".join(sentences).strip() for title, sentences in context if title in wanted]
    return _instruction("\n\n".join([*facts, row["question"]]), row["answer"])


def find_surrogate(ref: str) -> Surrogate | None:
    """The surrogate with this name or repo, at any revision."""
    name = ref.partition("@")[0]
    return SURROGATES.get(name) or next((known for known in SURROGATES.values() if known.repo == name), None)


SURROGATES: Mapping[str, Surrogate] = MappingProxyType(
    {
        "alpaca": Surrogate("tatsu-lab/alpaca", None, _alpaca, "MMLU"),
        "gsm8k": Surrogate("openai/gsm8k", "main", lambda row: _instruction(row["question"], row["answer"]), "ARC"),
        "hotpotqa": Surrogate("hotpotqa/hotpot_qa", "distractor", _hotpotqa, "TruthfulQA"),
    }
)
