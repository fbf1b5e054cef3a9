"""Model Breadcrumbs: of each tensor of a task vector, drop the smallest entries and the very largest, and add up what
is left. Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.runtime.shares import exact_share
from hf_locstitch.stitch.densities import Densities
from hf_locstitch.stitch.thinned import ThinnedTensors

if TYPE_CHECKING:
    from hf_locstitch.stitch.task_vectors import Vector


class Breadcrumbs(Densities, ThinnedTensors):
    """density: share of the entries that is kept of each tensor. densities: one for each finetune.
    gamma: share that is dropped as the largest."""

    name: Literal["breadcrumbs"] = "breadcrumbs"
    title: ClassVar[str] = "Model Breadcrumbs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.06795"
    gamma: float = Field(default=0.01, ge=0, lt=1, allow_inf_nan=False)

    def thin(self, task_vector: Vector, *, tensor: str, model: int) -> Vector:
        """Where density and gamma together are more than all, fewer of the largest are dropped."""
        import numpy as np

        n = task_vector.size
        kept = exact_share(self.density_of(tensor, model), n)
        smallest = max(0, n - kept - exact_share(self.gamma, n))
        order = abs(task_vector).reshape(-1).argsort(kind="stable")[smallest : smallest + kept]
        left = np.zeros(n)
        left[order] = task_vector.reshape(-1)[order]
        return left.reshape(task_vector.shape)


COMPONENT = Breadcrumbs
