"""What masks were found with, or values fitted to, is no test of the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_locstitch.tasks.evaluation_sets import EvaluationSet
from hf_locstitch.tasks.leaks import JudgedTask, UsedData, judged_set, leaks, used_open_set, used_set
from hf_locstitch.tasks.sets import LocalizationSet, open_set

OTHER = JudgedTask("hellaswag", "Rowan/hellaswag")


def said(task: JudgedTask, *used: UsedData) -> str:
    """The one warning."""
    (warning,) = leaks([task, OTHER], used)
    return warning


def used(ref: str, **fields: Any) -> UsedData:
    return used_set(LocalizationSet(ref=ref, **fields), "masks were found")


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (JudgedTask("gsm8k", "openai/gsm8k", "main"), used("openai/gsm8k")),
        (JudgedTask("gsm8k", "openai/gsm8k"), used("gsm8k")),
        (JudgedTask("gsm8k_cot", "OpenAI/GSM8K", "main"), used("gsm8k@" + "a" * 40)),
        (JudgedTask("mmlu_anatomy", "cais/mmlu", "anatomy"), used("cais/mmlu", config="anatomy")),
        (JudgedTask("mmlu", "cais/mmlu", None), used("cais/mmlu", config="anatomy")),
        (JudgedTask("hotpot", "hotpotqa/hotpot_qa"), used("hotpotqa")),
    ],
)
def test_a_data_set_is_known_by_repo_and_config(task: JudgedTask, data: UsedData) -> None:
    warning = said(task, data, data)
    assert warning.startswith(f"{task.name} is evaluated on {task.dataset}") and data.name in warning


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (JudgedTask("arc_challenge", "allenai/ai2_arc", "ARC-Challenge"), used("allenai/ai2_arc", config="ARC-Easy")),
        (JudgedTask("mmlu", "cais/mmlu"), used("tatsu-lab/alpaca")),
        (JudgedTask("arc_easy", "allenai/ai2_arc"), used("gsm8k")),
        (JudgedTask("truthfulqa_mc1"), used("hotpotqa")),
    ],
)
def test_what_is_no_leak(task: JudgedTask, data: UsedData) -> None:
    assert leaks([task], [data]) == []


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (JudgedTask("gsm8k_cot"), used("gsm8k")),
        (JudgedTask("gsm8k_cot"), used("data/GSM8K.jsonl")),
        (JudgedTask("mmlu"), used("somebody/mmlu")),
        (JudgedTask("letters", "demo/letters"), used("somebody/letters")),
    ],
)
def test_a_name_alone_is_said_to_be_a_name(task: JudgedTask, data: UsedData) -> None:
    assert said(task, data).startswith(f"{task.name} is named like {data.name}")


def judged(ref: str, **fields: Any) -> JudgedTask:
    return judged_set("mine", EvaluationSet(ref=ref, **fields))


def test_a_labelled_set_is_known_by_its_split_or_hash() -> None:
    """Its name says nothing: a set has that of a finetune."""
    found = used("org/set", config="a")
    assert leaks([judged("org/set", config="a"), judged("org/set", config="b", split="train")], [found]) == []
    for same in (judged("org/set", config="a", split="train"), judged("Org/Set", split="train[:50%]")):
        (warning,) = leaks([same], [found])
        assert warning.startswith("mine is evaluated on ")
    assert leaks([JudgedTask("set", "org/set", "a")], [found])  # of lm-eval's, whose split is not known
    a_file = used("./rows.jsonl", sha256="a" * 64)
    assert leaks([judged("./test.jsonl", sha256="b" * 64)], [a_file]) == []
    (warning,) = leaks([judged("./other.jsonl", sha256="a" * 64)], [a_file])
    assert warning.startswith("mine is evaluated on other.jsonl")
    half = used("./rows.jsonl", sha256="a" * 64, split="train[:50%]")
    assert leaks([judged("./rows.jsonl", sha256="a" * 64, split="test[50%:]")], [half]) == []  # no row of the file
    (warning,) = leaks([judged("./rows.jsonl", sha256="a" * 64, split="test[40%:]")], [half])
    (warning,) = leaks([judged("x/rows.jsonl")], [used("./rows.jsonl")])
    assert warning.startswith("mine is named like ./rows.jsonl")
    assert leaks([judged_set("rows", EvaluationSet(ref="./test.jsonl"))], [used("./rows.jsonl")]) == []
    (warning,) = leaks([judged("gsm8k", split="train")], [used("gsm8k")])
    assert warning.startswith("mine is evaluated on openai/gsm8k")


def test_a_file_leaks_if_its_rows_do(tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text(json.dumps({"prompt": "What is  2 + 2?", "completion": "4"}) + "\n")
    found = used_open_set(open_set(LocalizationSet(ref=str(path))), "values were fitted")
    same = JudgedTask("sums", prompts=frozenset({"what is 2 + 2?", "4"}))
    assert said(same, found).startswith("sums is evaluated on")
    answers_alike = JudgedTask("letters", prompts=frozenset({"what is 1 + 3?", "4"}))
    assert leaks([answers_alike], [found]) == []  # compared, and unlike, whatever they are called
    assert said(JudgedTask("letters"), found).startswith("letters is named like")
