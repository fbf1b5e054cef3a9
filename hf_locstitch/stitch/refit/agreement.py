"""Scoring a merged model against a finetuned model, or against labels. Lower is always better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.tasks.task import Task

SLICE = 1 << 22  # numbers of the outputs processed at once, in float64


def judge(by: str, merged: Tensor, finetuned: Tensor, task: Task, examples: Sequence[Any]) -> tuple[float, int]:
    """The score, summed over rows, and the number of rows. by: "agreement", "loss" or "accuracy". merged, finetuned:
    hidden states, or else outputs, [rows, numbers] of both models for these examples of the task."""
    rows = max(1, SLICE // max(1, merged.shape[-1]))
    if by == "agreement":
        slices = zip(merged.split(rows), finetuned.split(rows), strict=True)
        return sum((one.double() - other.double()).square().sum().item() for one, other in slices), len(merged)
    assert task.targets is not None
    targets = torch.tensor(task.targets(examples), device=merged.device)
    slices = zip(merged.split(rows), targets.split(rows), strict=True)
    return sum(_wrong(by, outputs, right) for outputs, right in slices), len(targets)


def _wrong(by: str, outputs: Tensor, right: Tensor) -> float:
    if by == "loss":
        return F.cross_entropy(outputs.double(), right, reduction="sum").item()
    return float((outputs.argmax(-1) != right).sum().item())


def disagreement(scores: Sequence[float], base: Sequence[float]) -> float:
    """The mean over tasks of the squared distances of the merged model's last hidden states from the finetuned model's,
    over those of the base's. 0 where they agree, 1 where nothing is gained over the base.

    Hidden states, because heads differ between tasks, and a finetuned model is overconfident on inputs like its own.
    """
    return sum(score / far if far > 0 else score for score, far in zip(scores, base, strict=True)) / len(scores)
