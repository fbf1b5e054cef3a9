"""The arithmetic of the refit without data: limits in which its result is known, and an independent solution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_locstitch.stitch.dataless.solution import (
    LOW_RANK,
    RIDGE,
    Threads,
    capped,
    dense,
    energy,
    input_gram,
    inside,
    moments,
    of_vectors,
)

ONE = Threads(1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(tasks: Sequence[Sequence[Tensor]], threads: Threads = ONE) -> list[Tensor]:
    return dense(moments(tasks, threads), threads)


def due(tasks: Sequence[Sequence[Tensor]]) -> list[np.ndarray]:
    """The same from its formula, in float64."""
    wide = [[vector.double().numpy() for vector in vectors] for vectors in tasks]
    width = wide[0][0].shape[1]
    grams = []
    for vectors in wide:
        stacked = np.concatenate([v / np.linalg.norm(v) for v in vectors if v.any()] or [np.zeros((1, width))])
        gram = stacked.T @ stacked
        grams.append(gram * (width / np.trace(gram)) if gram.any() else gram)
    total = [sum(vectors[layer] for vectors in wide) for layer in range(len(wide[0]))]
    above = sum(np.trace(s @ g @ v[i].T) for i, s in enumerate(total) for v, g in zip(wide, grams, strict=True))
    below = sum(np.trace(s @ g @ s.T) for s in total for g in grams)
    a = above / below
    system = sum(grams) + RIDGE * len(wide) * np.eye(width)
    rests = [sum((v[i] - a * s) @ g for v, g in zip(wide, grams, strict=True)) for i, s in enumerate(total)]
    return [a * s + rest @ np.linalg.inv(system) for s, rest in zip(total, rests, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_identical_task_vectors_give_that_one(count: int) -> None:
    vectors = [draw(30, 20, seed=1), draw(7, 20, seed=2)]
    for found, vector in zip(solved([vectors] * count), vectors, strict=True):
        assert torch.allclose(found, vector, atol=1e-5)
        assert count > 1 or torch.equal(found, vector)


def test_disjoint_task_vectors_give_their_sum() -> None:
    one, other = torch.zeros(8, 20), torch.zeros(8, 20)
    one[:, :10], other[:, 10:] = draw(8, 10, seed=1), draw(8, 10, seed=2)
    assert torch.allclose(solved([[one], [other]])[0], one + other, atol=1e-5)


def test_the_formula_in_float64() -> None:
    tasks = [[draw(700, 40, seed=seed), 0.1 * draw(9, 40, seed=10 + seed)] for seed in range(3)]
    for found, expected in zip(solved(tasks), due(tasks), strict=True):
        assert np.allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_a_badly_conditioned_gram_is_solved_in_float32() -> None:
    """Ten directions hold all but a millionth of every update."""
    spread = torch.cat([torch.ones(10), torch.full((290,), 1e-3)])
    tasks = [[draw(64, 300, seed=seed) * spread] for seed in range(3)]
    expected = due(tasks)[0]
    assert np.linalg.norm(solved(tasks)[0].numpy() - expected) < 1e-3 * np.linalg.norm(expected)


def test_threads_change_no_bit() -> None:
    tasks = [[draw(1500, 700, seed=seed)] for seed in range(2)]
    assert torch.equal(solved(tasks)[0], solved(tasks, Threads(3))[0])


def test_a_gram_is_symmetric_and_has_mean_diagonal_one() -> None:
    gram = input_gram([draw(50, 1100, seed=1), torch.zeros(3, 1100)], ONE)
    assert torch.equal(gram, gram.T) and gram.diagonal().mean().item() == pytest.approx(1)
    assert not input_gram([torch.zeros(3, 5)], ONE).any()


def test_a_finetune_that_changed_nothing_leaves_the_others_alone() -> None:
    vector, nothing = draw(20, 12, seed=1), torch.zeros(20, 12)
    found = solved([[vector], [nothing]])[0]
    assert torch.allclose(found, vector, atol=1e-5)
    assert not solved([[nothing], [nothing]])[0].any()
    assert not solved([[vector], [-vector]])[0].isnan().any()


def test_a_task_vector_ten_times_longer_does_not_drown_the_others() -> None:
    """Grams have equal weight: on the short one's rows the merge still does what it does."""
    short, long = draw(64, 32, seed=1), 10 * draw(64, 32, seed=2)
    short[:, 16:], long[:, :16] = 0, 0
    assert torch.allclose(solved([[short], [long]])[0], short + long, atol=1e-4)


def test_inside_a_mask_the_normal_equations_hold() -> None:
    tasks = [[draw(12, 24, seed=seed)] for seed in range(3)]
    found = moments(tasks, ONE)
    mask = draw(12, 24, seed=7) > 0.3
    begin = dense(found, ONE)[0] * mask
    values = inside(found, [begin], [mask], ONE)[0]
    assert not values[~mask].any()
    system = found.gram + RIDGE * 3 * torch.eye(24)
    due = (found.cross[0] - begin @ found.gram) * mask
    left = ((values - begin) @ system) * mask - due
    assert left.norm() < 1e-3 * due.norm()


def test_where_everything_is_in_the_mask_nothing_is_solved_twice() -> None:
    tasks = [[draw(12, 24, seed=1)]]
    found = moments(tasks, ONE)
    values = inside(found, dense(found, ONE), [torch.ones(12, 24, dtype=torch.bool)], ONE)[0]
    assert torch.allclose(values, tasks[0][0], atol=1e-5)


def test_vectors() -> None:
    same, other = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert of_vectors([same, same]).tolist() == [1.0, 2.0, 0.0]
    assert of_vectors([same, other]).tolist() == [1.0, 2.0, 0.0]
    assert of_vectors([torch.tensor([1e-30]), torch.tensor([3e-30])]).item() == pytest.approx(2.8e-30)


def test_a_runaway_change_is_cut_back() -> None:
    change, base = draw(4, 6, seed=1), draw(4, 6, seed=2)
    assert torch.equal(capped(change, base, math.inf), change)
    assert capped(100 * change, base, 0.0).norm().item() == pytest.approx(0.3 * base.norm().item(), rel=1e-5)
    assert capped(100 * change, base, 7.0).norm().item() == pytest.approx(7.0, rel=1e-5)


def test_low_rank_is_told_from_full() -> None:
    low = draw(128, 8, seed=1) @ draw(8, 96, seed=2)
    full = draw(128, 96, seed=3) * torch.logspace(0, -2, 96)
    assert (energy(low) or 0) > LOW_RANK > (energy(full) or 1)
    assert (
        energy(torch.zeros(64, 64)) is None and energy(draw(4, 4, seed=1)) is None and energy(draw(9, seed=1)) is None
    )
