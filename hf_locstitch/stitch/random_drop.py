"""What DARE and its kin share: entries of the task vectors are dropped at random."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.stitch.method import Place


class RandomDrop(BaseModel):
    """density: share of each task vector's entries that is kept (1 − the paper's drop rate). seed: of the random
    choice."""

    density: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)

    def kept(self, place: Place, model: int, count: int) -> npt.NDArray[np.bool_]:
        """Which entries from `place` on are kept [count]. model: number of the finetune."""
        return uniform(self.seed, place, model, count) < self.density


def uniform(seed: int, place: Place, model: int, count: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) for the entries from `place` on [count]; independent of how a tensor is cut."""
    import numpy as np  # not needed for planning

    bits = np.random.PCG64([seed, model, crc32(place.tensor.encode())])
    return np.random.Generator(bits.advance(place.first)).random(count)
