"""What DARE and its kin share: entries of the task vectors are dropped at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

from pydantic import Field

from hf_locstitch.stitch.densities import Densities

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.method import Context, Place
    from hf_locstitch.stitch.task_vectors import Vector


class RandomDrop(Densities):
    """density: share of each task vector's entries that is kept (1 − the paper's drop rate). densities: one for each
    finetune. seed: of the random choice."""

    seed: int = Field(default=0, ge=0)

    def kept(self, place: Place, model: int, count: int) -> npt.NDArray[np.bool_]:
        """Which entries from `place` on are kept [count]. model: number of the finetune."""
        return uniform(self.seed, place, model, count) < self.density_of(place.tensor, model)

    def rescaling(self, tensor: str, models: int, rescale: bool) -> tuple[float, list[float]]:
        """What is kept of all finetunes is divided by the first, and that of each multiplied by its own of the second,
        which is 1 where all have one density."""
        densities = [self.density_of(tensor, model) if rescale else 1.0 for model in range(models)]
        return densities[0], [densities[0] / density for density in densities]

    def kept_sum(
        self,
        start: Vector,
        finetuned: Sequence[Values],
        context: Context,
        *,
        rescale: bool = True,
    ) -> Vector:
        """scale · Σ weight · kept · (finetuned − start) [n]. rescale: each divided by its density."""
        divisor, factors = self.rescaling(context.tensor, len(finetuned), rescale)
        total = start * 0
        for model, (values, weight, factor) in enumerate(zip(finetuned, context.weights, factors, strict=True)):
            total += weight * factor * (values.astype("f8") - start) * self.kept(context.place, model, len(start))
        return context.scale / divisor * total


def uniform(seed: int, place: Place, model: int, count: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) for the entries from `place` on [count]; independent of how a tensor is cut."""
    import numpy as np  # not needed for planning

    bits = np.random.PCG64([seed, model, crc32(place.tensor.encode())])
    return np.random.Generator(bits.advance(place.first)).random(count)
