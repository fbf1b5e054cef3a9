"""Localize-and-Stitch in memory, as ALGORITHM says it, in as few lines as will do: what the package is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import torch

State = dict[str, torch.Tensor]


def differs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In any bit: 0.0 and −0.0 do."""
    return one.double().view(torch.int64) != other.double().view(torch.int64)


def reference_masks(base: State, finetuned: State, names: Sequence[str], density: str, scope: str = "model") -> State:
    """density: the decimal as written. The k largest |task vector|; ties, in (name, flat index) order, evenly."""
    names = sorted(names)
    groups = [names] if scope == "model" else [[name] for name in names]
    masks = {}
    for group in groups:
        scores = torch.cat([(finetuned[n].float() - base[n].float()).abs().flatten() for n in group])
        changed = torch.cat([differs(finetuned[n], base[n]).flatten() for n in group])
        scores[~changed] = -1  # in no mask
        k = min(math.floor(Fraction(density) * len(scores)), int(changed.sum()))
        threshold = scores.sort(descending=True).values[k - 1] if k else math.inf
        keep = scores > threshold
        ties = (scores == threshold).nonzero().flatten().tolist()
        r, t = k - int(keep.sum()), len(ties)
        for j, at in enumerate(ties):
            keep[at] = (j + 1) * r // t > j * r // t
        parts = keep.split([base[n].numel() for n in group])
        masks |= {n: part.reshape(base[n].shape) for n, part in zip(group, parts, strict=True)}
    return masks


def reference_stitch(base: State, finetuned: Sequence[State], masks: Sequence[State], scale: float = 1.0) -> State:
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for name in masks[0]:
        times = torch.stack([mask[name] for mask in masks]).sum(0)
        addends = [torch.where(m[name], f[name].double(), -0.0) for f, m in zip(finetuned, masks, strict=True)]
        total = reduce(torch.add, addends)  # −0 adds nothing, not even a sign
        mean = total / times.clamp(min=1)
        if scale != 1.0:
            mean = base[name].float() + scale * (mean.float() - base[name].float())
        merged[name] = torch.where(times > 0, mean.to(base[name].dtype), base[name])
    return merged
