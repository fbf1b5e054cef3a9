"""The share of examples whose class is predicted right."""

from __future__ import annotations

from typing import ClassVar

from hf_locstitch.tasks.answers import Answers
from hf_locstitch.tasks.metric import Metric, mean
from hf_locstitch.tasks.objective import Objective


class Accuracy(Metric):
    usual: ClassVar[int | None] = 0

    def suits(self, objective: Objective, classes: int) -> bool:
        return objective.labels == "rows" and classes > 1

    def measure(self, answers: Answers, classes: int) -> tuple[float, float | None]:
        assert answers.exact is not None
        return mean(answers.exact.astype("f8"))


COMPONENT = Accuracy
