"""How good a merged model's outputs are: beside a finetuned one's, or against labels. Less is better, always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.tasks.task import Task

SLICE = 1 << 22  # numbers of the outputs that are looked at together, in float64


def judge(by: str, merged: Tensor, finetuned: Tensor, task: Task, examples: Sequence[Any]) -> tuple[float, int]:
    """Summed over rows, and how many rows. by: "agreement", "loss" or "accuracy". merged, finetuned: the outputs
    [rows, numbers] of both models for these examples of the task."""
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
    """Summed over rows [rows, numbers]. logits: of classes or tokens, then half the sum of the differences of
    probabilities, 0 … 1; else squared distance over squared length.

    No divergence in nats: a finetuned model is all too sure on inputs like those it was finetuned on, and the logarithm
    of what the merged model gives the other classes there says little of how it does elsewhere.
    """
    one, other = merged.double(), finetuned.double()
    if logits:
        found = (one.softmax(-1) - other.softmax(-1)).abs().sum(-1) / 2
    else:
        found = (one - other).square().sum(-1) / other.square().sum(-1).clamp(min=torch.finfo(other.dtype).tiny)
    return found.sum().item()
