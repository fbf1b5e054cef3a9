"""Scoring a merged model's outputs against a finetuned model's, or against labels. Lower is always better."""

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
    the outputs [rows, numbers] of both models for these examples of the task."""
    rows = max(1, SLICE // max(1, merged.shape[-1]))
    if by == "agreement":
        slices = zip(merged.split(rows), finetuned.split(rows), strict=True)
        return sum(disagreement(one, other, task.logits) for one, other in slices), len(merged)
    assert task.targets is not None
    targets = torch.tensor(task.targets(examples), device=merged.device)
    slices = zip(merged.split(rows), targets.split(rows), strict=True)
    return sum(_wrong(by, outputs, right) for outputs, right in slices), len(targets)


def _wrong(by: str, outputs: Tensor, right: Tensor) -> float:
    if by == "loss":
        return F.cross_entropy(outputs.double(), right, reduction="sum").item()
    return float((outputs.argmax(-1) != right).sum().item())


def disagreement(merged: Tensor, finetuned: Tensor, logits: bool) -> float:
    """Summed over rows [rows, numbers]. logits: whether outputs are logits of classes or tokens; then
    total variation distance, 0 … 1; else squared distance over squared norm.

    Not a KL divergence: a finetuned model is overconfident on inputs like those it was finetuned on, and the logarithms
    of the merged model's probabilities for the other classes there say little about other inputs.
    """
    left, right = merged.double(), finetuned.double()
    if logits:
        distances = (left.softmax(-1) - right.softmax(-1)).abs().sum(-1) / 2
    else:
        distances = (left - right).square().sum(-1) / right.square().sum(-1).clamp(min=torch.finfo(right.dtype).tiny)
    return distances.sum().item()
