"""A claim of the paper as a part of the page: a table, a figure, comparisons, and the verdict that follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING

from reproduction.results import Results, SeedResult, Values
from reproduction.verdict import NO, OPEN, YES, Comparison, half_width, tally, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Claim:
    """name: of its figures' files. says: what is claimed, in our words. shows: what the table's numbers are.

    table: row -> testbed -> numbers, one a seed. figures: what each shows -> itself.
    """

    name: str
    title: str
    says: str
    shows: str
    table: Mapping[str, Mapping[str, Values]]
    comparisons: Sequence[Comparison]
    figures: Mapping[str, Figure]
    digits: int = 3
    notes: Sequence[str] = field(default=())

    @property
    def verdict(self) -> str:
        return verdict(self.comparisons)

    def heading(self, number: int) -> str:
        return f"{number}. {self.title}"

    def anchor(self, number: int) -> str:
        """As Markdown makes it of the heading."""
        return re.sub(r"[^a-z0-9 ]", "", self.heading(number).lower()).replace(" ", "-")

    def parts(self, number: int, figures: str) -> list[str]:
        """Of the page, in Markdown. figures: their folder, as seen from the page."""
        testbeds = list(dict.fromkeys(testbed for one in self.comparisons for testbed in one.margins))
        return [
            f"## {self.heading(number)}",
            self.says,
            self.reading(),
            f"{self.shows} Mean ± standard deviation over the seeds.",
            table(["", *testbeds], [[row, *(self.cell(own, t) for t in testbeds)] for row, own in self.table.items()]),
            *(f"![{what}]({figures}/{self.name}{at or ''}.svg)" for at, what in enumerate(self.figures)),
            "Comparisons: the mean difference ± half of its confidence interval.",
            table(["above zero if the claim holds", *testbeds], [self._row(one, testbeds) for one in self.comparisons]),
            *self.notes,
        ]

    def cell(self, row: Mapping[str, Values], testbed: str) -> str:
        values = row.get(testbed, ())
        if not values:
            return ""
        around = f" ± {stdev(values):.{self.digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{self.digits}f}{around}"

    def _row(self, one: Comparison, testbeds: Sequence[str]) -> list[str]:
        return [one.what, *(self._difference(one, testbed) if testbed in one.margins else "" for testbed in testbeds)]

    def _difference(self, one: Comparison, testbed: str) -> str:
        margins = one.margins[testbed]
        around = f" ± {half_width(margins):.{self.digits}f}" if len(margins) > 1 else ""
        return f"{mean(margins):+.{self.digits}f}{around}, {one.outcomes[testbed]}"

    def reading(self) -> str:
        """In words: the verdict, and where it comes from."""
        counts = tally(self.comparisons)
        return (
            f"**{self.verdict.capitalize()}**. Of {counts.total()} comparisons: {counts[YES]} as claimed, {counts[NO]} "
            f"the other way, {counts[OPEN]} not to be told from chance."
        )

    def tallied(self, testbed: str) -> str:
        """How many comparisons hold there, are open, and go the other way."""
        found = [one.outcomes[testbed] for one in self.comparisons if testbed in one.margins]
        return " / ".join(str(found.count(outcome)) for outcome in (YES, OPEN, NO))


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown, the first column to the left, numbers to the right."""
    rule = "| --- |" + " ---: |" * (len(heading) - 1)
    return "\n".join([f"| {' | '.join(heading)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def above(results: Results, what: str, left: Callable[[SeedResult], float], right: Callable[[SeedResult], float]):
    """That one number is larger than another, seed by seed."""
    return Comparison(what, results.each(lambda seed: left(seed) - right(seed)))
