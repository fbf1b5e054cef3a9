"""Masked least squares for one linear, against the closed form row by row."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_locstitch.stitch.refit import agreement
from hf_locstitch.stitch.refit.agreement import disagreement, judge
from hf_locstitch.stitch.refit.models import batched
from hf_locstitch.stitch.refit.solve import solve_masked, system, with_ones
from hf_locstitch.tasks.task import Task


def closed_form(tasks: list[tuple[Tensor, Tensor]], mask: Tensor, lambda_: float, ridge: float) -> Tensor:
    """Row by row, the minimum over the weights in its mask. tasks: inputs [tokens, inputs], targets [tokens, outputs].

    Each task counts alike: mean over its tokens of |x·δᵀ − r|², plus the two penalties on δ.
    """
    s = torch.stack([x.T @ x / len(x) for x, _ in tasks]).sum(0)
    b = torch.stack([r.T @ x / len(x) for x, r in tasks]).sum(0)
    penalty = lambda_ * s.diagonal() + ridge * s.diagonal().mean()
    solution = torch.zeros_like(mask, dtype=s.dtype)
    for row, kept in enumerate(mask):
        at = kept.nonzero().flatten()
        solution[row, at] = torch.linalg.solve(s[at][:, at] + torch.diag(penalty[at]), b[row, at])
    return solution


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_closed_form(lambda_: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    tasks = [(draw(tokens, 8), draw(tokens, 700)) for tokens in (40, 90)]
    mask = torch.rand(700, 8, generator=generator) < 0.4
    mask[3] = False
    gram = torch.stack([x.T @ x / len(x) for x, _ in tasks]).sum(0)
    cross = torch.stack([r.T @ x / len(x) for x, r in tasks]).sum(0)
    found = solve_masked(system(gram, lambda_, 0.01), cross, mask, steps=12)
    due = closed_form(tasks, mask, lambda_, 0.01)
    assert not found[~mask].any()
    assert torch.allclose(found, due, atol=1e-5)
    assert due.abs().max() > 0.01


def test_by_hand() -> None:
    """One output, two inputs of which one may change: S = [[2, 1], [1, 4]], B = [3, 5], λ = 0.5, no ridge."""
    gram, cross = torch.tensor([[2.0, 1.0], [1.0, 4.0]]), torch.tensor([[3.0, 5.0]])
    matrix = system(gram, 0.5, 0.0)
    assert torch.equal(matrix, torch.tensor([[3.0, 1.0], [1.0, 6.0]]))
    assert torch.allclose(solve_masked(matrix, cross, torch.tensor([[True, False]]), 3), torch.tensor([[1.0, 0.0]]))
    both = solve_masked(matrix, cross, torch.tensor([[True, True]]), 3)
    assert torch.allclose(both @ matrix, cross, atol=1e-5)
    assert torch.allclose(torch.diag(system(gram, 0.0, 0.1)), torch.tensor([2.3, 4.3]))


def test_a_bias_is_a_column_of_ones() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(with_ones(x), torch.tensor([[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]]))


def test_few_steps_do_not_reach_the_solution_and_nothing_divides_by_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 30, generator=generator)
    gram, cross = x.T @ x, torch.randn(4, 30, generator=generator)
    mask = torch.ones(4, 30, dtype=torch.bool)
    due = closed_form([(x, torch.zeros(100, 4))], mask, 0.0, 1e-6) * 0 + torch.linalg.solve(gram, cross.T).T
    errors = [(solve_masked(gram, cross, mask, steps) - due).norm().item() for steps in (1, 4, 12, 60)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and torch.isfinite(torch.tensor(errors)).all()
    assert not solve_masked(gram, torch.zeros(4, 30), mask, 5).any()


def test_disagreement() -> None:
    task = Task([], [], lambda *_: torch.zeros(()))
    one, other = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert judge("agreement", one, other, task, []) == (5.0, 2)
    assert disagreement([1.0, 3.0], [4.0, 2.0]) == (1 / 4 + 3 / 2) / 2
    assert disagreement([0.0, 3.0], [0.0, 6.0]) == 0.25  # a finetune that is the base


def test_loss_and_accuracy() -> None:
    task = Task([], [], lambda *_: torch.zeros(()), targets=lambda examples: [label for _, label in examples])
    ln3 = torch.tensor([[1.0986122886681098, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    examples = [("a", 0), ("b", 1), ("c", 0)]
    other = torch.full_like(ln3, torch.nan)  # the finetuned model is not asked
    loss, rows = judge("loss", ln3, other, task, examples)
    due = math.log(4 / 3) + math.log(2) + math.log(1 + math.e)
    assert rows == 3 and loss == pytest.approx(due)
    assert judge("accuracy", ln3, other, task, examples) == (2.0, 3)  # of equal logits the first is the answer


@pytest.mark.parametrize("by", ["agreement", "loss", "accuracy"])
def test_outputs_are_judged_a_few_rows_at_a_time(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task([], [], lambda *_: torch.zeros(()), targets=lambda examples: examples)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(50, 7, generator=generator) for _ in range(2))
    right = torch.randint(0, 7, (50,), generator=generator).tolist()
    whole = judge(by, one, other, task, right)
    monkeypatch.setattr(agreement, "SLICE", 20)  # two rows
    found = judge(by, one, other, task, right)
    assert found == (pytest.approx(whole[0], rel=1e-12), 50) and whole[1] == 50


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 20))
def test_batches_hold_all_in_order_and_no_more_than_they_may(weights: list[int], size: int, most: int) -> None:
    count = len(weights)
    found = batched(Task(range(count), weights, lambda *_: torch.zeros(())), 0, count, size, most)
    assert [number for batch in found for number in batch] == list(range(len(weights)))
    for batch, after in zip(found, [*found[1:], None], strict=True):
        total = sum(weights[number] for number in batch)
        assert 1 <= len(batch) <= size and (total <= most or len(batch) == 1)
        if after is not None:  # the next one had no place
            assert len(batch) == size or total + weights[after[0]] > most
