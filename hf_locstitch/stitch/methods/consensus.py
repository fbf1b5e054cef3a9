"""Consensus merging: the sum of the task vectors, where at least some of the finetunes need it, by their TALL masks.
Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024,
arXiv 2405.07813."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.stitch.method import Context, DenseMethod

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class Consensus(DenseMethod):
    """threshold: the masks' λ: an entry is a finetune's if it changed by at least λ times what the sum of all is off
    from it there. agree: how many finetunes an entry has to belong to."""

    name: Literal["consensus"] = "consensus"
    title: ClassVar[str] = "Consensus (TALL masks)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.07813"
    weighted: ClassVar[bool] = True
    threshold: float = Field(default=0.4, ge=0, allow_inf_nan=False)
    agree: int = Field(default=2, ge=0)

    def misfit(self, models: int) -> str | None:
        if self.agree > models:
            return f"consensus keeps what {self.agree} finetunes agree on (agree), but there are {models}"
        return None

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ weight · task vector where enough masks agree, in float64; masks are of weighted ones."""
        from hf_locstitch.stitch.task_vectors import task_vectors

        start = base.astype("f8")
        vectors = [
            weight * vector for weight, vector in zip(context.weights, task_vectors(start, finetuned), strict=True)
        ]
        total = sum(vectors[1:], start=vectors[0])
        belongs = [abs(vector) >= self.threshold * abs(total - vector) for vector in vectors]
        return (start + context.scale * total * (sum(belongs) >= self.agree)).astype(context.dtype)


COMPONENT = Consensus
