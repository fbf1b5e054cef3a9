"""How masks overlap: counts of coordinates, added up chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Overlap:
    """covered: by how many masks each coordinate is covered [models + 1]. pairs: covered by both [models, models]."""

    covered: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]

    @classmethod
    def none(cls, models: int) -> Overlap:
        return cls(np.zeros(models + 1, np.int64), np.zeros((models, models), np.int64))

    def in_order(self, places: Sequence[int]) -> Overlap:
        """Of the same models in another order. places: where each is now."""
        return Overlap(self.covered, self.pairs[np.ix_(places, places)])

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.covered + other.covered, self.pairs + other.pairs)

    def pair_records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """As the manifest has them. names: of the masks, in order."""
        ones = self.pairs.diagonal().tolist()
        return [
            pair_record(names[i], names[j], int(self.pairs[i, j]), ones[i], ones[j])
            for i, j in combinations(range(len(names)), 2)
        ]


def pair_record(a: str, b: str, both: int, a_ones: int, b_ones: int) -> dict[str, Any]:
    """Two masks, the coordinates in both, and their Jaccard index."""
    return {"masks": [a, b], "both": both, "jaccard": jaccard(both, a_ones, b_ones)}


def jaccard(both: int, a: int, b: int) -> float:
    """|A ∩ B| / |A ∪ B| from the sizes of A ∩ B, A and B; 0 of empty sets."""
    either = a + b - both
    return both / either if either else 0.0
