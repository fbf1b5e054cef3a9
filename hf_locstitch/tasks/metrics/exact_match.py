"""The share of examples whose whole answer a language model gives, token for token, up to the end of the text.

That every token has the greatest logit after those before it is to say that greedy decoding gives the answer.
"""

from __future__ import annotations

from typing import ClassVar

from hf_locstitch.tasks.answers import Answers
from hf_locstitch.tasks.metric import Metric, mean
from hf_locstitch.tasks.objective import Objective


class ExactMatch(Metric):
    usual: ClassVar[int | None] = 2

    def suits(self, objective: Objective, classes: int) -> bool:
        return objective.labels == "text"

    def measure(self, answers: Answers, classes: int) -> tuple[float, float | None]:
        assert answers.exact is not None
        return mean(answers.exact.astype("f8"))


COMPONENT = ExactMatch
