"""The mean of the F1 of each class that is predicted or present."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.tasks.metric import ClassMetric
from hf_locstitch.tasks.metrics.f1 import f1_of_classes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class MacroF1(ClassMetric):
    def of(self, confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        there = (confusion.sum(-1) + confusion.sum(-2)) > 0
        return f1_of_classes(confusion).sum(-1) / there.sum(-1)  # 0 where a class is not there


COMPONENT = MacroF1
