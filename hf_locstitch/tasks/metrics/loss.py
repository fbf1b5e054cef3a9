"""The objective's loss: the mean over all units, which are the answers' tokens, or the examples."""

from __future__ import annotations

from typing import ClassVar

from hf_locstitch.tasks.answers import Answers
from hf_locstitch.tasks.metric import Metric, mean
from hf_locstitch.tasks.objective import Objective


class Loss(Metric):
    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[int | None] = 1

    def suits(self, objective: Objective, classes: int) -> bool:
        return objective.labels != "none"

    def measure(self, answers: Answers, classes: int) -> tuple[float, float | None]:
        return mean(answers.losses, answers.weights)


COMPONENT = Loss
