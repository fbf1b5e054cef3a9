"""What a model answered to the examples of a set: all that metrics are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Answers:
    """Every array has one number an example, [examples].

    losses: float64, summed over the example's units; weights: int64, how many these are: an answer's tokens, or 1.
    exact: bool, whether each unit has the greatest logit; predicted, wanted: int64, the class. None: not known.
    """

    losses: npt.NDArray[np.float64]
    weights: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_] | None = None
    predicted: npt.NDArray[np.int64] | None = None
    wanted: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.losses)


def joined(parts: Sequence[Answers]) -> Answers:
    """Those to all parts of a set, in order."""
    import numpy as np

    def of(name: str) -> npt.NDArray[np.generic] | None:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    return Answers(**{name: of(name) for name in Answers.__dataclass_fields__})  # type: ignore[arg-type]
