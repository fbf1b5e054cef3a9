"""SCE against a transcription in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import load, random_state, same_bits
from helpers.rivals import check_change, elect, models
from helpers.runs import merged
from torch import Tensor

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.stitch.methods.sce import most_different


def sce(vectors: Tensor, density: float) -> Tensor:
    """Select by variance, calculate weights from squares, erase the minority's signs."""
    variance = vectors.var(0, unbiased=False).flatten()
    count = int(density * int((variance > 0).sum()) + 1e-9) if density < 1 else variance.numel()
    selected = torch.zeros_like(variance)
    selected[variance.argsort(descending=True)[:count]] = 1
    vectors = vectors * selected.reshape(vectors.shape[1:])
    squares = vectors.square().reshape(len(vectors), -1).mean(1)
    weights = squares / squares.sum() if squares.sum() else torch.full_like(squares, 1 / len(squares))
    sign = vectors.sum(0).sign()
    agrees = ((vectors.sign() == sign) & (sign != 0)).double()
    total = torch.einsum("m,m...->...", weights, agrees)
    return torch.einsum("m,m...->...", weights, vectors * agrees) / torch.where(total == 0, 1.0, total)


@pytest.mark.parametrize(("density", "scale"), [(0.1, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_equals_the_transcription(tmp_path: Path, density: float, scale: float) -> None:
    method = {"name": "sce", "density": density}
    check_change(tmp_path, lambda vectors: sce(vectors, density), method=method, scale=scale)


def test_what_no_finetune_changed_is_the_base(tmp_path: Path) -> None:
    base = random_state(0)
    assert same_bits(load(merged(tmp_path, base, [base, base], method="sce")), base)


def test_one_finetune_differs_from_none(tmp_path: Path) -> None:
    """With a density below 1 nothing would be selected, and the merge would be the base."""
    base, (finetuned,) = models(1)
    with pytest.raises(RecipeError, match=r"selects where finetunes differ.*density: 1"):
        make_recipe({"base": "a/b", "finetuned": ["c/d"], "method": "sce"})
    assert same_bits(load(merged(tmp_path, base, [finetuned], method={"name": "sce", "density": 1})), finetuned)


def test_those_that_differ_most_are_selected() -> None:
    found = most_different([np.array([1.0, 0, 5, 3]), np.array([1.0, 2, -5, 3])], 0.5)
    assert found.tolist() == [False, False, True, False]  # half of the two that differ at all


def test_the_election_counts_the_finetunes_alike() -> None:
    """A transcription that elected by the weighted sum would keep 0.9."""
    vectors = torch.tensor([[0.9, 9.0], [-0.5, 0.0], [-0.5, 0.0]]).double()
    assert sce(vectors, 1.0)[0] == pytest.approx(-0.5)
    assert elect(torch.tensor([[0.9], [-0.1]]), torch.tensor([1.0, 1.0]), True) == pytest.approx(0.9)
