"""WUDI-Merging in closed form: what interferes least with each task's own update, nearest to their sum. Source: Cheng
et al., Whoever Started the Interference Should End It, ICML 2025, arXiv 2503.08099, equation 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.stitch.matrix_method import MatrixMethod

if TYPE_CHECKING:
    from torch import Tensor


class Wudi(MatrixMethod):
    """ridge: how much the distance to the sum counts. The paper descends from the sum a few hundred steps towards what
    this solves for."""

    name: Literal["wudi"] = "wudi"
    title: ClassVar[str] = "WUDI-Merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.08099"
    squares: ClassVar[float] = 5
    ridge: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    def change(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """argmin over X of Σ ‖(X − τ) τᵀ‖² / ‖τ‖², and the ridge: a refit without data of one layer, from the sum."""
        from hf_locstitch.stitch.dataless.solution import Threads, dense, moments

        found = moments(([vector] for vector in task_vectors), Threads(1))
        (change,) = dense(found, Threads(1), share=1.0, ridge=self.ridge)
        return change


COMPONENT = Wudi
