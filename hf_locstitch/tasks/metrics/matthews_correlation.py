"""Matthews correlation of predicted and right classes, of any number; 0 if either is always the same class.

Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.tasks.metric import ClassMetric

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class MatthewsCorrelation(ClassMetric):
    def of(self, confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        import numpy as np

        counts = confusion.astype("f8")
        right, predicted, every = counts.sum(-1), counts.sum(-2), counts.sum((-2, -1))
        agreeing = np.trace(counts, axis1=-2, axis2=-1)
        covariance = agreeing * every - (right * predicted).sum(-1)
        spread = (every**2 - (right**2).sum(-1)) * (every**2 - (predicted**2).sum(-1))
        return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)


COMPONENT = MatthewsCorrelation
