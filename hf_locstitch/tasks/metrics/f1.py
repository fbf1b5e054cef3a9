"""F1 of the class 1 of two: 2 · right / (predicted + present); 0 if it is neither predicted nor present."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.tasks.metric import ClassMetric
from hf_locstitch.tasks.objective import Objective

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class F1(ClassMetric):
    def suits(self, objective: Objective, classes: int) -> bool:
        return super().suits(objective, classes) and classes == 2

    def of(self, confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return f1_of_classes(confusion)[..., 1]


def f1_of_classes(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64 [..., classes]. confusion: int64 [..., right class, predicted class]."""
    import numpy as np

    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return 2 * right / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)


COMPONENT = F1
