"""Model Breadcrumbs against a transcription in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.rivals import check_change, elect
from torch import Tensor

from hf_locstitch.stitch.methods.breadcrumbs import Breadcrumbs

WEIGHTS = [0.7, 0.5, 0.2]


def between_the_tails(vector: Tensor, density: float, gamma: float) -> Tensor:
    n = vector.numel()
    kept, top = int(density * n + 1e-9), int(gamma * n + 1e-9)
    order = vector.abs().flatten().argsort()
    left = torch.zeros(n, dtype=torch.float64)
    wanted = order[max(0, n - kept - top) :][:kept]
    left[wanted] = vector.flatten()[wanted]
    return left.reshape(vector.shape)


@pytest.mark.parametrize(
    ("density", "gamma", "elects", "normalize"),
    [(0.3, 0.1, False, False), (0.3, 0.1, True, False), (0.5, 0.05, True, True), (0.9, 0.3, False, True)],
)
def test_equals_the_transcription(tmp_path: Path, density: float, gamma: float, elects: bool, normalize: bool) -> None:
    def change(vectors: Tensor) -> Tensor:
        weights = torch.tensor(WEIGHTS).double()
        left = torch.stack([between_the_tails(vector, density, gamma) for vector in vectors])
        weighted = torch.einsum("m,m...->m...", weights, left)
        if elects:
            return elect(weighted, weights, normalize)
        return weighted.sum(0) / (weights.sum() if normalize else 1)

    method = {"name": "breadcrumbs", "density": density, "gamma": gamma, "elect": elects, "normalize": normalize}
    check_change(tmp_path, change, method=method, weights=WEIGHTS, scale=0.8)


def test_both_tails_are_dropped() -> None:
    thin = Breadcrumbs(density=0.4, gamma=0.2).thin
    assert thin(np.array([5.0, -1.0, 2.0, -4.0, 0.5]), tensor="w", model=0).tolist() == [0, 0, 2, -4, 0]


def test_the_count_is_that_of_the_decimals() -> None:
    """29 of 100, though 0.29 · 100 is below 29 in floating point."""
    left = Breadcrumbs(density=0.29, gamma=0.0).thin(np.arange(1.0, 101.0), tensor="w", model=0)
    assert left.tolist() == [0.0] * 71 + list(range(72, 101))
