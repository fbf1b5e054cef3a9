"""Consensus merging against a transcription in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import finetune, load, random_state, same_bits
from helpers.rivals import check_change
from helpers.runs import merged
from torch import Tensor

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe


@pytest.mark.parametrize(("threshold", "agree", "scale"), [(0.4, 2, 1.0), (0.2, 3, 0.3), (1.0, 1, 1.0)])
def test_equals_the_transcription(tmp_path: Path, threshold: float, agree: int, scale: float) -> None:
    def change(vectors: Tensor) -> Tensor:
        total = vectors.sum(0)
        masks = vectors.abs() >= threshold * (total - vectors).abs()
        return total * (masks.sum(0) >= agree)

    method = {"name": "consensus", "threshold": threshold, "agree": agree}
    check_change(tmp_path, change, method=method, scale=scale)


def test_what_one_finetune_alone_needs_is_left_out(tmp_path: Path) -> None:
    base = random_state(0)
    alone = finetune(base, 0)
    assert same_bits(load(merged(tmp_path / "a", base, [alone, base], method="consensus")), base)
    shared = load(merged(tmp_path / "b", base, [alone, alone], method={"name": "consensus"}, scale=0.5))
    assert all(torch.allclose(shared[name], alone[name], atol=1e-6) for name in base)


def test_more_agreement_than_finetunes() -> None:
    with pytest.raises(RecipeError, match="what 3 finetunes agree on"):
        make_recipe({"base": "a/b", "finetuned": ["c/d", "e/f"], "method": {"name": "consensus", "agree": 3}})
