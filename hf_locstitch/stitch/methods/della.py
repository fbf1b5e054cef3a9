"""DELLA: drop entries of the task vectors at random, the smaller of a row the likelier, rescale the rest, elect a sign
and average those that agree. Source: Deep et al., DELLA-Merging, arXiv 2406.11617."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hf_locstitch.stitch.method import Place
from hf_locstitch.stitch.random_drop import RandomDrop, uniform
from hf_locstitch.stitch.thinned import ThinnedTensors

if TYPE_CHECKING:
    from hf_locstitch.stitch.task_vectors import Vector


class Della(RandomDrop, ThinnedTensors):
    """density: how likely the entries of a row are kept on average. epsilon: how much less likely the smallest of the
    row is, and how much likelier the largest. rescale: whether what is kept is divided by how likely that was."""

    name: Literal["della"] = "della"
    title: ClassVar[str] = "DELLA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11617"
    density: float = Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    epsilon: float = Field(default=0.15, ge=0, le=0.5, allow_inf_nan=False)
    rescale: bool = True
    elect: bool = True
    normalize: bool = True

    @model_validator(mode="after")
    def _are_chances(self) -> Della:
        for density in self.every_density:
            if density < 1 and not (density - self.epsilon > 0 and density + self.epsilon <= 1):
                raise ValueError(
                    f"entries are kept with chances from density − epsilon to density + epsilon, but {density:g} ± "
                    f"{self.epsilon:g} is not within 0 and 1"
                )
        return self

    def thin(self, task_vector: Vector, *, tensor: str, model: int) -> Vector:
        density = self.density_of(tensor, model)
        if density == 1:
            return task_vector
        chances = kept_chances(task_vector, density, self.epsilon)
        drawn = uniform(self.seed, Place(tensor, 0), model, task_vector.size).reshape(task_vector.shape)
        left = task_vector * (drawn < chances)
        return left / chances if self.rescale else left


def kept_chances(task_vector: Vector, density: float, epsilon: float) -> Vector:
    """Of each entry [*shape]: from density − epsilon for the smallest of its row to density + epsilon for the largest,
    by rank. Rows are of the last dimension, of convolutions (four dimensions and more) of all but the first."""
    import numpy as np

    first, *others = task_vector.shape
    width = math.prod(others) if len(others) > 2 else others[-1] if others else first
    rows = abs(task_vector).reshape(-1, width)
    order = rows.argsort(axis=1, kind="stable")
    steps = np.linspace(density - epsilon, density + epsilon, width) if width > 1 else [density]
    chances = np.empty(rows.shape)
    np.put_along_axis(chances, order, np.broadcast_to(steps, rows.shape), axis=1)
    return chances.reshape(task_vector.shape)


COMPONENT = Della
