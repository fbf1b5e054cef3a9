"""A metric: the mean of the recall of each class that is present."""

from typing import ClassVar

import numpy as np

from hf_locstitch.tasks.metric import ClassMetric


class BalancedAccuracy(ClassMetric):
    higher_is_better: ClassVar[bool] = True

    def of(self, confusion):
        right, present = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1)
        return (right / np.maximum(present, 1)).sum(-1) / (present > 0).sum(-1)
