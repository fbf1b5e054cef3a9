"""Localize-and-Stitch: the mean of the finetuned values under the masks. Source: arXiv 2408.13656."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.methods import Masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hf_locstitch.localize.selection import Kept
    from hf_locstitch.stitch import Coverage


def combine(
    base: torch.Tensor, kept: Sequence[Kept], covered: Coverage, *, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    from hf_locstitch.stitch import stitch  # needs torch, which a plan does not

    return stitch(base, kept, covered, scale=scale, dtype=dtype)


METHOD = Masked("Localize-and-Stitch", "https://arxiv.org/abs/2408.13656", combine, density=0.1, blocks_only=True)
