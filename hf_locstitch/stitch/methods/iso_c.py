"""Iso-C: the sum of the task vectors, in matrices with all singular values as large as their mean. Source: Marczak et
al., No Task Left Behind, ICML 2025, arXiv 2502.04959, section 4.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.matrix_method import MatrixMethod

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(MatrixMethod):
    name: Literal["iso-c"] = "iso-c"
    title: ClassVar[str] = "Iso-C"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    def change(self, task_vectors: Sequence[Tensor]) -> Tensor:
        import torch

        total = sum(task_vectors[1:], start=task_vectors[0])
        left, sizes, right = torch.linalg.svd(total, full_matrices=False)
        return sizes.mean() * left @ right


COMPONENT = IsoC
