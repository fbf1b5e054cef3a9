"""What was measured, seed by seed, as the claims ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

Values = Sequence[float]  # one a seed


@dataclass(frozen=True)
class SeedResult:
    """content: of a record, and what the testbed is. Shares are of the experts' accuracies."""

    content: Mapping[str, Any]

    @property
    def number(self) -> int:
        return self.content["facts"]["seed"]

    @property
    def tasks(self) -> Sequence[str]:
        return self.content["tasks"][: self.content["main"]]

    def merged(self, row: str, count: int | None = None) -> dict[str, float]:
        """Share by task of a row's merge of so many tasks, the testbed's own number by default."""
        count = count or self.content["main"]
        return self._shares(self.content["test"][f"{count} {self.chosen(row, count)}"])

    def chosen(self, row: str, count: int | None = None) -> str:
        """The merge that validation chose."""
        return self.content["chosen"][f"{count or self.content['main']} {row}"]

    def mean(self, row: str, count: int | None = None) -> float:
        """Over the tasks; "base" is a row, too."""
        if row == "base":
            base = self.content["base"]["test"]
            return mean(self._shares({task: base[task] for task in self.tasks}).values())
        return mean(self.merged(row, count).values())

    def alone(self, row: str) -> float:
        """Mean share of what each mask holds alone."""
        return mean(self._shares(self.content["alone"][row]).values())

    def ability(self, row: str) -> float:
        """What is left of the base, in the testbed's own unit. row: also "base", and "experts" for their mean."""
        known = self.content["ability"]
        return known[row] if row in ("base", "experts") else known[self.chosen(row)]

    def jaccard(self, row: str, what: str = "jaccard") -> float:
        """Mean over every two masks. what: "jaccard", or by chance "anywhere" or "within tensors"."""
        return mean(pair[what] for pair in self.content["overlap"][row])

    def density_ratio(self, row: str, kind: str) -> dict[str, float]:
        """Group or layer -> share of the masks' ones in it over its share of the elements. kind: groups, layers."""
        counted = self.content["layout"][row][kind]
        elements = sum(counts[0] for counts in counted.values())
        ones = [sum(column) for column in zip(*(counts[1:] for counts in counted.values()), strict=True)]
        return {
            name: mean(own / total for own, total in zip(counts[1:], ones, strict=True)) / (counts[0] / elements)
            for name, counts in counted.items()
        }

    def size(self, row: str) -> float:
        """Mask and values as files, over the finetuned model's weights: mean over the tasks."""
        return mean((one["masks"] + one["values"]) / one["finetuned"] for one in self.content["bytes"][row].values())

    def _shares(self, accuracy: Mapping[str, float]) -> dict[str, float]:
        experts = self.content["experts"]["test"]
        return {task: value / experts[task] for task, value in accuracy.items()}


@dataclass(frozen=True)
class Results:
    """testbed -> its seeds."""

    testbeds: Mapping[str, Sequence[SeedResult]]

    @classmethod
    def of(cls, contents: Sequence[Mapping[str, Any]]) -> Results:
        found: dict[str, list[SeedResult]] = {}
        for content in contents:
            found.setdefault(content["facts"]["testbed"], []).append(SeedResult(content))
        return cls(found)

    def each(self, number: Callable[[SeedResult], float]) -> dict[str, Values]:
        """testbed -> the number of every seed."""
        return {testbed: [number(seed) for seed in seeds] for testbed, seeds in self.testbeds.items()}

    def counts(self, testbed: str) -> list[int]:
        """The numbers of tasks that were merged."""
        return sorted({int(key.split(" ")[0]) for key in self.testbeds[testbed][0].content["chosen"]})

    def first(self) -> SeedResult:
        return next(iter(self.testbeds.values()))[0]
