"""TSV-Merge: of each task vector's matrix the largest singular directions, as many as are left to each, made orthogonal
together. Source: Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081, algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.matrix_method import MatrixMethod, directions, nearest_orthogonal

if TYPE_CHECKING:
    from torch import Tensor


class TsvM(MatrixMethod):
    name: Literal["tsv-m"] = "tsv-m"
    title: ClassVar[str] = "TSV-Merge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.00081"
    copies: ClassVar[float] = 15
    of_each: ClassVar[float] = 3

    def change(self, task_vectors: Sequence[Tensor]) -> Tensor:
        import torch

        kept = max(1, min(task_vectors[0].shape) // len(task_vectors))
        left, sizes, right = [], [], []
        for vector in task_vectors:
            own_left, own_sizes, own_right = torch.linalg.svd(vector, full_matrices=False)
            own = min(kept, directions(own_sizes))
            left.append(own_left[:, :own].clone())  # not to keep all of it
            sizes.append(own_sizes[:own])
            right.append(own_right[:own].clone())
        if not any(map(len, sizes)):
            return torch.zeros_like(task_vectors[0])
        scaled = nearest_orthogonal(torch.cat(left, 1)) * torch.cat(sizes)
        return scaled @ nearest_orthogonal(torch.cat(right))


COMPONENT = TsvM
