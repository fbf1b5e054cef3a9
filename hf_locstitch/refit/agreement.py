"""How far a merged model's outputs are from a finetuned one's."""

from __future__ import annotations

import torch
from torch import Tensor


def disagreement(merged: Tensor, finetuned: Tensor, logits: bool) -> tuple[float, int]:
    """Summed over rows [rows, numbers], and how many rows. logits: of classes or tokens, then half the sum of the
    differences of probabilities, 0 … 1; else squared distance over squared length.

    No divergence in nats: a finetuned model is all too sure on inputs like those it was finetuned on, and the logarithm
    of what the merged model gives the other classes there says little of how it does elsewhere.
    """
    one, other = merged.double(), finetuned.double()
    if logits:
        found = (one.softmax(-1) - other.softmax(-1)).abs().sum(-1) / 2
    else:
        found = (one - other).square().sum(-1) / other.square().sum(-1).clamp(min=torch.finfo(other.dtype).tiny)
    return found.sum().item(), len(found)
