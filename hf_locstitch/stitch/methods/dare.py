"""DARE: drop entries of the task vectors at random, rescale the rest, and add them up. Source: Yu et al., Language
Models are Super Mario, ICML 2024, arXiv 2311.03099."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from zlib import crc32

from pydantic import Field

from hf_locstitch.stitch.method import DenseMethod, Place

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.runtime.dtypes import Values


class Dare(DenseMethod):
    """density: share of each task vector's entries that is kept (1 − the paper's drop rate). seed: of the random
    choice."""

    name: Literal["dare"] = "dare"
    title: ClassVar[str] = "DARE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    density: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)

    def combine(
        self, base: Values, finetuned: Sequence[Values], *, place: Place, scale: float, dtype: np.dtype[Any]
    ) -> Values:
        """base + scale · Σ kept · (finetuned − base) / density, in float64."""
        start = base.astype("f8")
        total = start * 0
        for number, values in enumerate(finetuned):
            total += (values.astype("f8") - start) * self.kept(place, number, len(base))
        return (start + scale / self.density * total).astype(dtype)

    def kept(self, place: Place, model: int, count: int) -> npt.NDArray[np.bool_]:
        """Which entries from `place` on are kept [count]; independent of how a tensor is cut into chunks."""
        import numpy as np  # not needed for planning

        bits = np.random.PCG64([self.seed, model, crc32(place.tensor.encode())])
        return np.random.Generator(bits.advance(place.first)).random(count) < self.density


COMPONENT = Dare
