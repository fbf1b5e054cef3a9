"""Localizing without data: the k largest |task vector| entries. Source: arXiv 2408.13656, section 3.2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Magnitude(BaseModel):
    """density: share of the localizable elements that a mask keeps, 0 … 1.

    scope: "model" takes the top k over all localizable tensors together (the paper's), "tensor" inside each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["magnitude"] = "magnitude"
    density: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    scope: Literal["model", "tensor"] = "model"

    def groups(self, numels: Sequence[int]) -> list[tuple[list[int], int]]:
        """Which tensors (by number) compete with one another, and how many elements each group keeps."""
        if self.scope == "model":
            return [(list(range(len(numels))), exact_share(self.density, sum(numels)))]
        return [([tensor], exact_share(self.density, numel)) for tensor, numel in enumerate(numels)]

    def kept(self, numels: Sequence[int]) -> int:
        """Number of ones in a mask over tensors of these sizes (k)."""
        return sum(k for _, k in self.groups(numels))

    def describe(self) -> str:
        scope = "over the whole model" if self.scope == "model" else "inside each tensor"
        return f"{self.method}, density {self.density:g}, largest |task vector| {scope}"


def exact_share(density: float, n: int) -> int:
    """⌊density·n⌋ for the decimal that was written: 0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point."""
    return math.floor(Fraction(repr(density)) * n)
