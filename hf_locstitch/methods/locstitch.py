"""Localize-and-Stitch: the mean of the finetuned values under the masks. Source: arXiv 2408.13656."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_locstitch.methods import Masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from hf_locstitch.checkpoints.dtypes import Values
    from hf_locstitch.localize.selection import Kept
    from hf_locstitch.stitch import Coverage


def combine(base: Values, kept: Sequence[Kept], covered: Coverage, *, scale: float, dtype: np.dtype[Any]) -> Values:
    from hf_locstitch.stitch import stitch  # needs what is slow to import, which a plan does not

    return stitch(base, kept, covered, scale=scale, dtype=dtype)


METHOD = Masked("Localize-and-Stitch", "https://arxiv.org/abs/2408.13656", combine, density=0.1, blocks_only=True)
