"""Alpaca's template of instructions, whole, as in https://github.com/tatsu-lab/stanford_alpaca: the answer follows at
once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def alpaca_prompt(row: Mapping[str, Any]) -> str:
    """The prompt of a row. An instruction may have a column of its own, and then its input, too."""
    if not row.get("instruction"):
        return ALPACA.format(instruction=row["prompt"])
    template = ALPACA_WITH_INPUT if row.get("input") else ALPACA
    return template.format(instruction=row["instruction"], input=row.get("input"))
