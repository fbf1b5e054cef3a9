"""Model Stock against a transcription in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import finetune, load, random_state, same_bits
from helpers.runs import merged
from torch import Tensor


def stock(base: Tensor, finetuned: list[Tensor], rows: bool, scale: float) -> Tensor:
    """t · mean + (1 − t) · base, t = k cos θ / (1 + (k − 1) cos θ), of the tensor or of each of its rows."""
    start = base.double().reshape(len(base) if rows and base.dim() > 1 else 1, -1)
    vectors = torch.stack([f.double().reshape(start.shape) - start for f in finetuned])
    count = len(vectors)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    cosines = torch.stack([(units[i] * units[j]).sum(-1) for i in range(count) for j in range(i)]).mean(0)
    t = count * cosines / (1 + (count - 1) * cosines)
    return (start + scale * t[:, None] * vectors.mean(0)).reshape(base.shape).to(base.dtype)


@pytest.mark.parametrize(("count", "rows", "scale"), [(2, False, 1.0), (3, False, 0.5), (3, True, 1.0)])
def test_equals_the_transcription(tmp_path: Path, count: int, rows: bool, scale: float) -> None:
    base = random_state(0)
    common = finetune(base, 9, step=0.1)
    finetuned = [finetune(common, seed, step=0.05) for seed in range(count)]
    method = {"name": "model-stock", "filter_wise": rows}
    found = load(merged(tmp_path, base, finetuned, method=method, scale=scale))
    for name, start in base.items():
        due = stock(start, [state[name] for state in finetuned], rows, scale)
        assert np.allclose(found[name], due, rtol=3e-7, atol=1e-8), name


def test_what_agrees_is_the_mean_and_what_is_opposed_is_the_base(tmp_path: Path) -> None:
    base = random_state(0)
    one = finetune(base, 1)
    assert same_bits(load(merged(tmp_path / "a", base, [one, one], method="model-stock")), one)
    opposed = {name: 2 * value - one[name] for name, value in base.items()}
    found = load(merged(tmp_path / "b", base, [one, opposed], method="model-stock"))
    assert all(torch.allclose(found[name], base[name], atol=1e-6) for name in base)


def test_what_no_finetune_changed_is_the_base(tmp_path: Path) -> None:
    base = random_state(0)
    assert same_bits(load(merged(tmp_path, base, [base, base], method="model-stock")), base)
