"""The Karcher mean: that it is the stationary point on the sphere, and its length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import finetune, load, random_state, same_bits
from helpers.rivals import models
from helpers.runs import merged
from torch import Tensor

METHOD = {"name": "karcher", "max_iter": 100, "tol": 1e-9}


def towards(mean: Tensor, other: Tensor) -> Tensor:
    """The tangent at one unit vector along the arc to another, as long as the arc."""
    cosine = (mean @ other).clamp(-1, 1)
    beyond = other - cosine * mean
    return torch.arccos(cosine) * beyond / beyond.norm()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.6, 0.3, 0.1)])
def test_the_arcs_to_the_finetunes_cancel(tmp_path: Path, weights: tuple[float, ...]) -> None:
    base, finetuned = models(step=0.6)
    found = load(merged(tmp_path, base, finetuned, method=METHOD, weights=list(weights), dtype="float32"))
    shares = torch.tensor(weights).double() / sum(weights)
    for name, start in base.items():
        if start.dim() == 0:
            continue  # a sphere of two points
        vectors = [state[name].double().flatten() for state in finetuned]
        mean = found[name].double().flatten()
        assert mean.norm() == pytest.approx(float(sum(s * v.norm() for s, v in zip(shares, vectors, strict=True))))
        mean = mean / mean.norm()
        rest = sum(share * towards(mean, v / v.norm()) for share, v in zip(shares, vectors, strict=True))
        assert torch.as_tensor(rest).norm() < 1e-6


def test_two_of_one_length_meet_halfway_as_by_slerp(tmp_path: Path) -> None:
    base = random_state(0)
    first = finetune(base, 0, step=0.8)
    second = finetune(base, 1, step=0.8)
    second = {name: value * first[name].norm() / value.norm() for name, value in second.items()}
    karcher = load(merged(tmp_path / "a", base, [first, second], method=METHOD))
    slerp = load(merged(tmp_path / "b", base, [first, second], method="slerp"))
    assert all(torch.allclose(karcher[name], slerp[name], rtol=1e-5, atol=1e-6) for name in base)


def test_zeros_have_no_direction_but_a_length(tmp_path: Path) -> None:
    base = random_state(0)
    one = finetune(base, 0)
    nothing = {name: torch.zeros_like(value) for name, value in base.items()}
    found = load(merged(tmp_path / "a", base, [one, nothing], method="karcher"))
    assert all(torch.allclose(found[name], one[name] / 2) for name in base)
    assert same_bits(load(merged(tmp_path / "b", base, [nothing, nothing], method="karcher")), nothing)


def test_opposite_directions_cancel_in_favour_of_one(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3)}
    finetuned = [{"w": torch.tensor([1.0, 0, 0])}, {"w": torch.tensor([-1.0, 0, 0])}]
    assert load(merged(tmp_path, base, finetuned, method="karcher"))["w"].abs().tolist() == [1.0, 0, 0]
