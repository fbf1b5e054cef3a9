"""Localize-and-Stitch: the mean of the finetuned values under the masks. Source: arXiv 2408.13656."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.methods import Masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from hf_locstitch.localize.selection import Kept


def combine(
    base: torch.Tensor, kept: Sequence[Kept], times: npt.NDArray[np.uint8], *, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    from hf_locstitch.stitch import stitch  # needs torch, which a plan does not

    return stitch(base, kept, times, scale=scale, dtype=dtype)


METHOD = Masked("Localize-and-Stitch", "https://arxiv.org/abs/2408.13656", combine, density=0.1, blocks_only=True)
