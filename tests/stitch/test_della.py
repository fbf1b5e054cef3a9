"""DELLA: how likely entries are kept, and what becomes of those that are."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from helpers.models import finetune, load, random_state
from helpers.rivals import elect, models, task_vectors
from helpers.runs import merged

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.stitch.methods.della import kept_chances


def chances(vector: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """By rank in rows of the last dimension, of a convolution in filters; the mean where a row has one entry."""
    width = vector[0].numel() if vector.dim() > 3 else vector.shape[-1] if vector.dim() else 1
    rows = vector.abs().reshape(-1, width)
    ranks = rows.argsort(dim=1).argsort(dim=1).double()
    share = ranks / (width - 1) if width > 1 else torch.full_like(ranks, 0.5)
    return (density - epsilon + 2 * epsilon * share).reshape(vector.shape)


@pytest.mark.parametrize(
    ("elects", "normalize", "rescale", "seed"),
    [(True, True, True, 0), (False, False, True, 3), (True, False, False, 1)],
)
def test_equals_the_transcription(tmp_path: Path, elects: bool, normalize: bool, rescale: bool, seed: int) -> None:
    base, finetuned = models()
    method = {"name": "della", "density": 0.6, "epsilon": 0.2, "seed": seed, "rescale": rescale}
    method |= {"elect": elects, "normalize": normalize}
    weights = torch.tensor([0.7, 0.5, 0.2]).double()
    found = load(merged(tmp_path, base, finetuned, method=method, weights=weights.tolist(), scale=0.8))
    for name, start in base.items():
        left = []
        for number, vector in enumerate(task_vectors(base, finetuned, name)):
            kept_at = chances(vector, 0.6, 0.2)
            drawn = np.random.Generator(np.random.PCG64([seed, number, crc32(name.encode())])).random(vector.numel())
            kept = torch.from_numpy(drawn).reshape(vector.shape) < kept_at
            left.append(vector * kept / (kept_at if rescale else 1))
        weighted = torch.einsum("m,m...->m...", weights, torch.stack(left))
        change = elect(weighted, weights, normalize) if elects else weighted.sum(0)
        torch.testing.assert_close(found[name], (start.double() + 0.8 * change).float(), rtol=3e-7, atol=1e-7, msg=name)


def test_chances_rise_with_the_rank_in_a_row() -> None:
    found = kept_chances(np.array([[3.0, -1.0, 2.0], [0.1, 0.3, -0.2]]), 0.5, 0.2)
    assert np.allclose(found, [[0.7, 0.3, 0.5], [0.3, 0.7, 0.5]])
    assert kept_chances(np.array([2.0]), 0.5, 0.2) == 0.5


def test_the_mean_is_that_of_the_task_vector(tmp_path: Path) -> None:
    """Rescaling makes up for what is dropped: the sum of 40,000 entries stays, to within four deviations."""
    base = {"w": torch.zeros(200, 200)}
    changed = finetune(base, 1)
    method = {"name": "della", "density": 0.4, "epsilon": 0.2, "elect": False, "normalize": False}
    vector, found = changed["w"].double(), load(merged(tmp_path, base, [changed], method=method))["w"].double()
    kept_at = chances(vector, 0.4, 0.2)
    deviation = ((1 - kept_at) / kept_at * vector**2).sum().sqrt()
    assert 0.35 < (found != 0).double().mean() < 0.45
    assert abs(found.abs().sum() - vector.abs().sum()) < 4 * deviation < 0.05 * vector.abs().sum()


def test_density_one_drops_nothing(tmp_path: Path) -> None:
    base = random_state(0)
    one = finetune(base, 0)
    found = load(merged(tmp_path, base, [one], method={"name": "della", "density": 1}))
    assert all(torch.allclose(found[name], one[name], atol=1e-7) for name in base)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.3, 0.3)])
def test_chances_are_within_0_and_1(density: float, epsilon: float) -> None:
    method = {"name": "della", "density": density, "epsilon": epsilon}
    with pytest.raises(RecipeError, match="is not within 0 and 1"):
        make_recipe({"base": "a/b", "finetuned": ["c/d"], "method": method})
