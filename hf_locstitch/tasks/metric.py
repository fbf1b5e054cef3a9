"""The metric interface: a number for a model's answers to a set, with its standard error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from hf_locstitch.tasks.answers import Answers
from hf_locstitch.tasks.objective import Objective

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RESAMPLES = 1000  # of the bootstrap
TOGETHER = 1 << 24  # counts of them in memory


class Metric(ABC):
    """A metric of your own is one subclass in one file; its name is the module's, with dashes.

    higher_is_better: whether it is. usual: its place among the metrics that are reported unless others are asked for,
    the first being the main one; None: only if asked for.
    """

    higher_is_better: ClassVar[bool] = True
    usual: ClassVar[int | None] = None

    @abstractmethod
    def suits(self, objective: Objective, classes: int) -> bool:
        """Whether it is defined for answers to this objective. classes: how many there are; 1 without labels."""

    @abstractmethod
    def measure(self, answers: Answers, classes: int) -> tuple[float, float | None]:
        """The value and its standard error, None where that is not known."""


class ClassMetric(Metric):
    """A metric that depends on the confusion matrix alone; its standard error is a bootstrap over examples."""

    def suits(self, objective: Objective, classes: int) -> bool:
        return objective.labels == "rows" and classes > 1

    @abstractmethod
    def of(self, confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """confusion: int64 [..., right class, predicted class], counts of examples. Returns float64 [...]."""

    def measure(self, answers: Answers, classes: int) -> tuple[float, float | None]:
        import numpy as np

        found = confusion_matrix(answers, classes)
        value = float(self.of(found))
        if len(answers) < 2:
            return value, None
        return value, float(np.concatenate([self.of(some) for some in resampled(found)]).std(ddof=1))


def mean(values: npt.NDArray[np.float64], weights: npt.NDArray[np.int64] | None = None) -> tuple[float, float | None]:
    """Σ values / Σ weights and its standard error, examples being independent: of a ratio of means, to first order.

    values: float64 [examples], summed over each one's units; weights: their numbers of units, all 1 by default: it is
    then the mean, and the sample standard deviation over √examples.
    """
    import numpy as np

    count = len(values)
    units = np.ones(count) if weights is None else weights
    found = float(values.sum() / units.sum())
    if count < 2:
        return found, None
    spread = float(np.square(values - found * units).sum()) * count / (count - 1)
    return found, math.sqrt(spread) / float(units.sum())


def confusion_matrix(answers: Answers, classes: int) -> npt.NDArray[np.int64]:
    """int64 [right class, predicted class], counts of examples."""
    import numpy as np

    assert answers.wanted is not None and answers.predicted is not None
    cells = answers.wanted * classes + answers.predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def resampled(confusion: npt.NDArray[np.int64], seed: int = 0) -> Iterator[npt.NDArray[np.int64]]:
    """Confusion matrices of RESAMPLES sets of as many examples, drawn with replacement, some at a time [some, …]: to
    draw examples is to draw cells by their shares."""
    import numpy as np

    cells = confusion.reshape(-1)
    there = np.flatnonzero(cells)  # few of the cells of many classes
    drawn = np.random.default_rng(seed).multinomial(cells.sum(), cells[there] / cells.sum(), RESAMPLES)
    some = max(1, TOGETHER // confusion.size)
    for first in range(0, RESAMPLES, some):
        part = drawn[first : first + some]
        found = np.zeros((len(part), confusion.size), np.int64)
        found[:, there] = part
        yield found.reshape(-1, *confusion.shape)
