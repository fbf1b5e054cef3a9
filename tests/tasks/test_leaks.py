"""What masks were found with, or values fitted to, is no test of the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_locstitch.tasks.leaks import JudgedTask, UsedData, leaks, used_open_set, used_set
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


def test_a_file_leaks_if_its_rows_do(tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text(json.dumps({"prompt": "What is  2 + 2?", "completion": "4"}) + "\n")
    found = used_open_set(open_set(LocalizationSet(ref=str(path))), "values were fitted")
    same = JudgedTask("sums", prompts=frozenset({"what is 2 + 2?", "4"}))
    assert said(same, found).startswith("sums is evaluated on")
    answers_alike = JudgedTask("letters", prompts=frozenset({"what is 1 + 3?", "4"}))
    assert leaks([answers_alike], [found]) == []  # compared, and unlike, whatever they are called
    assert said(JudgedTask("letters"), found).startswith("letters is named like")
