"""Shares of counts, exact to one element."""

from __future__ import annotations

import math
from fractions import Fraction


def exact_share(density: float, n: int) -> int:
    """⌊density·n⌋ for the decimal as written: 0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point."""
    return math.floor(Fraction(repr(density)) * n)
