"""What models are judged on, of whatever kind: items with names, each with scores of its own on every model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from hf_locstitch.evaluation.models import Model
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.leaks import JudgedTask


class Suite(ABC):
    """Items of one kind: lm-eval's tasks, or labelled sets. What is wrong with them is found as it is made.

    names: of the items, as requested. flags: of the command line that request them. limit: examples per item, None for
    all. logs: whether examples are logged, so that cached scores do not do.
    """

    names: Sequence[str]
    flags: tuple[str, ...]
    limit: int | None = None
    logs: bool = False

    @abstractmethod
    def check(self, model: Model) -> None:
        """Judges by config and file names only. Raises CheckpointError if the model cannot be judged by this."""

    @abstractmethod
    def facts(self, model: Model, name: str) -> dict[str, Any]:
        """All that determines the scores of the model on an item: the cache's key. Plain values."""

    @abstractmethod
    def measure(
        self, model: Model, names: Sequence[str], processes: Processes
    ) -> Iterator[tuple[str, list[TaskResult]]]:
        """Each item with its results, as they come; of a group or tag these may be several. Every process takes part;
        only the first need get results. Raises RequestError or WorkError.
        """

    @abstractmethod
    def judged(self, results: Sequence[TaskResult], texts: bool) -> list[JudgedTask]:
        """What the leak rule looks at, of the items that these results are of. texts: whether those of the examples are
        needed."""

    def notes(self, results: Sequence[TaskResult]) -> list[str]:
        """What else is to be said of the scores, the same for every model."""
        return []

    @property
    def entries(self) -> dict[str, Any]:
        """The items that flags alone do not say, by name, as a recipe has them."""
        return {}
