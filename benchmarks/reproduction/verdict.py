"""When a claim counts as confirmed: a rule that knows nothing of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

YES, NO, OPEN = "yes", "no", "open"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """margins: testbed -> of each seed a number that is above zero where the claim holds."""

    what: str
    margins: Mapping[str, Sequence[float]]

    @property
    def outcomes(self) -> dict[str, str]:
        return {testbed: outcome(margins) for testbed, margins in self.margins.items()}


def half_width(values: Sequence[float]) -> float:
    """Of the confidence interval of the mean, by Student's t over the seeds; infinite for one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return float("inf")
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def outcome(margins: Sequence[float]) -> str:
    """YES or NO if the interval is on one side of zero, else OPEN."""
    middle, wide = mean(margins), half_width(margins)
    return YES if middle > wide else NO if middle < -wide else OPEN


def tally(comparisons: Sequence[Comparison]) -> Counter[str]:
    """How many outcomes there are of each kind."""
    return Counter(found for one in comparisons for found in one.outcomes.values())


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Confirmed if all outcomes are YES, not confirmed if none is, else partly."""
    counts = tally(comparisons)
    if counts[YES] == counts.total():
        return "confirmed"
    return "partly confirmed" if counts[YES] else "not confirmed"
