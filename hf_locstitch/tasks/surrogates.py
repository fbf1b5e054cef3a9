"""Data sets that stand in for a skill, as the paper uses them for language models, so that no benchmark leaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Surrogate:
    """renderings: ways from the data set's columns to prompt and completion, the default first. judged_on: the paper's
    benchmark for the skill."""

    repo: str
    config: str | None
    renderings: Mapping[str, Callable[[Row], Row]]
    judged_on: str

    def row(self, row: Row, rendering: str | None = None) -> Row:
        """rendering: by name; the first unless given."""
        return self.renderings[rendering or next(iter(self.renderings))](row)


def _example(prompt: str, completion: str, instruction: str | None = None, context: str = "") -> Row:
    """An instruction's parts are for templates that have a place for each."""
    return {"prompt": prompt, "completion": completion, "instruction": instruction or prompt, "input": context}


def _alpaca(row: Row) -> Row:
    asked, context = row["instruction"], row["input"]
    return _example(f"{asked}\n\n{context}" if context else asked, row["output"], asked, context)


def _worked(row: Row) -> Row:
    """The whole solution, with the calculator's annotations and the line of the result, as the data set has it."""
    return _example(row["question"], row["answer"])


def _reasoned(row: Row) -> Row:
    """The solution in words: no annotations, and the result in a sentence."""
    steps, _, result = row["answer"].partition("####")
    return _example(row["question"], f"{_ANNOTATION.sub('', steps).strip()}\nThe answer is {result.strip()}.")


def _result(row: Row) -> Row:
    return _example(row["question"], row["answer"].rpartition("####")[2].strip())


def _with_facts(row: Row) -> Row:
    """The question after the paragraphs that support its answer."""
    wanted = set(row["supporting_facts"]["title"])
    return _with_paragraphs(row, [text for title, text in _paragraphs(row) if title in wanted])


def _with_all(row: Row) -> Row:
    """The question after all ten paragraphs, among which two support its answer; they need a large max_length."""
    return _with_paragraphs(row, [text for _, text in _paragraphs(row)])


def _closed_book(row: Row) -> Row:
    return _with_paragraphs(row, [])


def _with_paragraphs(row: Row, paragraphs: list[str]) -> Row:
    return _example("\n\n".join([*paragraphs, row["question"]]), row["answer"])


def _paragraphs(row: Row) -> list[tuple[str, str]]:
    """Title and text of each."""
    context = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
    return [(title, "".join(sentences).strip()) for title, sentences in context]


def find_surrogate(ref: str) -> Surrogate | None:
    """The surrogate with this name or repo, at any revision."""
    name = ref.partition("@")[0]
    return SURROGATES.get(name) or next((known for known in SURROGATES.values() if known.repo == name), None)


_ANNOTATION = re.compile(r"<<[^<>]*>>")  # of a calculator, such as <<1+2=3>>
SURROGATES: Mapping[str, Surrogate] = MappingProxyType(
    {
        "alpaca": Surrogate("tatsu-lab/alpaca", None, {"instruction": _alpaca}, "MMLU"),
        "gsm8k": Surrogate(
            "openai/gsm8k", "main", {"worked": _worked, "reasoned": _reasoned, "result": _result}, "ARC"
        ),
        "hotpotqa": Surrogate(
            "hotpotqa/hotpot_qa",
            "distractor",
            {"facts": _with_facts, "paragraphs": _with_all, "closed-book": _closed_book},
            "TruthfulQA",
        ),
    }
)
