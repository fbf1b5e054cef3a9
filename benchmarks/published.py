"""Data-free merges by others, in memory, to compare with: nothing of them is in the package.

Each takes the base's and the experts' tensors by name, and says what the merged ones are. Matrices of the transformer
blocks are merged by the method, other tensors of the blocks by the mean, all else is the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_locstitch.checkpoints.localizable import BLOCKS

State = Mapping[str, Tensor]


def tsv_m(vectors: Sequence[Tensor]) -> Tensor:
    """TSV-Merge: of each task the largest singular directions, as many as are left to each, made orthogonal together.

    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv
    2412.00081, algorithm 1.
    """
    kept = max(1, min(vectors[0].shape) // len(vectors))
    left, sizes, right = [], [], []
    for vector in vectors:
        u, s, v = torch.linalg.svd(vector, full_matrices=False)
        left.append(u[:, :kept])
        sizes.append(s[:kept])
        right.append(v[:kept])
    return _orthogonal(torch.cat(left, 1)) @ torch.diag(torch.cat(sizes)) @ _orthogonal(torch.cat(right))


def _orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def wudi(vectors: Sequence[Tensor]) -> Tensor:
    """What WUDI-Merging's descent from the sum of the task vectors approaches, solved for, with a ridge of a tenth.

    Source: Cheng et al., Whoever Started the Interference Should End It, ICML 2025, arXiv 2503.08099, equation 5.
    """
    total = torch.stack(list(vectors)).sum(0)
    grams = [vector.T @ vector / vector.square().sum() for vector in vectors if vector.any()]
    if not grams:
        return total
    summed = torch.stack(grams).sum(0)
    rest = sum((v - total) @ gram for v, gram in zip([v for v in vectors if v.any()], grams, strict=True))
    system = summed + 0.1 * summed.diagonal().mean() * torch.eye(len(summed))
    return total + torch.linalg.solve(system, rest, left=False)


PUBLISHED: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {"tsv-m": tsv_m, "wudi, solved for": wudi}


def merge_published(method: str, base: State, experts: Sequence[State]) -> dict[str, Tensor]:
    """The merged tensors by name. method: a key of PUBLISHED."""
    merged = {}
    for name, start in base.items():
        if not BLOCKS.search(name):
            merged[name] = start
            continue
        vectors = [(expert[name].double() - start.double()) for expert in experts]
        change = PUBLISHED[method](vectors) if start.dim() == 2 else torch.stack(vectors).mean(0)
        merged[name] = (start.double() + change).to(start.dtype)
    return merged
