"""Which linear layers of an adapter are stored by entries and which whole: sizes alone decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VALUE_BYTES = 4  # float32, in which PEFT keeps them
SHORT = 1 << 15  # rows or columns that two-byte indices can tell


@dataclass(frozen=True)
class Linear:
    """A linear layer with `ones` changed weights among rows × columns. whole_bytes: of all its parameters.

    An adapter of rank r has r · (rows + columns) entries in each layer, in those with fewer changes, too.
    """

    rows: int
    columns: int
    ones: int
    whole_bytes: int

    @property
    def index_bytes(self) -> int:
        return 2 if max(self.rows, self.columns) <= SHORT else 4

    @property
    def rank(self) -> int:
        """The smallest that has an entry for each change."""
        return -(-self.ones // (self.rows + self.columns))

    def entries(self, rank: int) -> int:
        return rank * (self.rows + self.columns)

    def nbytes(self, rank: int) -> int:
        """Of value, row and column of each entry."""
        return self.entries(rank) * (VALUE_BYTES + 2 * self.index_bytes)

    def fits(self, rank: int) -> bool:
        """Whether the rank has enough entries for it, but not more than it has weights, and they are smaller than it
        whole."""
        entries = self.entries(rank)
        return self.ones <= entries <= self.rows * self.columns and self.nbytes(rank) < self.whole_bytes


def best_rank(layers: Sequence[Linear]) -> int:
    """The rank for which all layers together are smallest; 0 if that is all of them whole. Ties go to the lower."""

    def total(rank: int) -> int:
        return sum(layer.nbytes(rank) if layer.fits(rank) else layer.whole_bytes for layer in layers)

    return min(sorted({0, *(layer.rank for layer in layers)}), key=total)
