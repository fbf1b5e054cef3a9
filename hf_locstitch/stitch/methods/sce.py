"""SCE: select the entries in which the task vectors differ most, weigh the finetunes by how much they changed there,
and erase what has the sign of the minority. Source: Wan et al., FuseChat, arXiv 2408.07990, section 3.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.runtime.shares import exact_share
from hf_locstitch.stitch.method import Context, TensorMethod

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.task_vectors import Vector


class Sce(TensorMethod):
    """density: share that is selected of each tensor's entries in which the task vectors differ."""

    name: Literal["sce"] = "sce"
    title: ClassVar[str] = "SCE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.07990"
    copies: ClassVar[float] = 7
    of_each: ClassVar[float] = 2.5
    density: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)

    def misfit(self, models: int) -> str | None:
        if models == 1 and self.density < 1:
            return "sce selects where finetunes differ, which one alone does not: merge several, or set density: 1"
        return super().misfit(models)

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · the mean of the selected entries that have the sign of their sum, each finetune weighted by
        the mean square of its own, in float64."""
        import numpy as np

        from hf_locstitch.stitch.task_vectors import elected_sign, mean_of_sign, task_vectors

        start = base.astype("f8")
        vectors = list(task_vectors(start, finetuned))
        if self.density < 1:
            selected = most_different(vectors, self.density)
            vectors = [vector * selected for vector in vectors]
        sign = elected_sign(vectors)
        energies = [float(np.square(vector).sum()) for vector in vectors]
        own = [energy / sum(energies) for energy in energies] if sum(energies) else [1.0 / len(vectors)] * len(vectors)
        weighted = [vector * weight for vector, weight in zip(vectors, own, strict=True)]
        return (start + mean_of_sign(weighted, own, sign, scale=context.scale, normalize=True)).astype(context.dtype)


def most_different(vectors: Sequence[Vector], density: float) -> npt.NDArray[np.bool_]:
    """The entries [*shape] with the largest variance over the task vectors: a share of those where it is not 0."""
    import numpy as np

    mean = sum(vectors[1:], start=vectors[0]) / len(vectors)
    variance = sum(np.square(vector - mean) for vector in vectors)
    assert isinstance(variance, np.ndarray)
    count = exact_share(density, int(np.count_nonzero(variance)))
    order = np.argsort(-variance.reshape(-1), kind="stable")[:count]
    selected = np.zeros(variance.size, bool)
    selected[order] = True
    return selected.reshape(variance.shape)


COMPONENT = Sce
