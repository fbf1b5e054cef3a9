"""TIES: trim, elect a sign, average those that agree. Source: Yadav et al., TIES-Merging, NeurIPS 2023,
arXiv 2306.01708. Trimming is the top k of |task vector|, over the whole model as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, MaskedMethod

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.artifacts.mask_source import MaskedValues
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.mean import Coverage


class Ties(MaskedMethod):
    """normalize: whether those that agree are averaged, not added up."""

    name: Literal["ties"] = "ties"
    title: ClassVar[str] = "TIES"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    weighted: ClassVar[bool] = True
    default_density: ClassVar[float] = 0.2
    normalize: bool = True

    @property
    def normalized(self) -> bool:
        """No: only the weights of those that agree are summed."""
        return False

    def combine(self, base: Values, kept: Sequence[MaskedValues], covered: Coverage, context: Context) -> Values:
        """base + scale · mean of the trimmed task vectors whose sign is that of their sum, in float64."""
        import numpy as np  # not needed for planning

        from hf_locstitch.stitch.task_vectors import agreeing_mean

        where = np.flatnonzero(covered.times)
        start = base[where].astype("f8")
        trimmed = [_trimmed(where, one, base) for one in kept]
        merged = base.astype(context.dtype)
        update = agreeing_mean(trimmed, context.weights, scale=context.scale, normalize=self.normalize)
        merged[where] = (start + update).astype(context.dtype)
        return merged


def _trimmed(where: npt.NDArray[np.int64], kept: MaskedValues, base: Values) -> npt.NDArray[np.float64]:
    """The task vector at positions `where` [m], which some mask keeps: 0 where this mask does not. Returns [m]."""
    import numpy as np

    task_vector = np.zeros(len(where))
    change = kept.values.astype(np.float64) - base[kept.positions].astype(np.float64)
    task_vector[where.searchsorted(kept.positions)] = change
    return task_vector


COMPONENT = Ties
