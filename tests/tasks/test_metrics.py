"""Metrics against scikit-learn, and their standard errors against the plain way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch.errors import RecipeError
from hf_locstitch.tasks.answers import Answers, joined
from hf_locstitch.tasks.choosing_metrics import chosen_metrics
from hf_locstitch.tasks.metric import ClassMetric
from hf_locstitch.tasks.metrics import METRICS
from hf_locstitch.tasks.objectives import OBJECTIVES


def answers(predicted: list[int], wanted: list[int]) -> Answers:
    one, other = np.array(predicted), np.array(wanted)
    return Answers(np.arange(len(one), dtype="f8"), np.ones(len(one), "i8"), one == other, one, other)


def value(name: str, found: Answers, classes: int) -> tuple[float, float | None]:
    return METRICS.find(name)().measure(found, classes)


pairs = st.integers(2, 5).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=40),
    )
)


@given(pairs)
def test_values_are_those_of_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes, both = drawn
    predicted, wanted = map(list, zip(*both, strict=True))
    found = answers(predicted, wanted)
    assert value("accuracy", found, classes)[0] == pytest.approx(accuracy_score(wanted, predicted))
    macro = f1_score(wanted, predicted, average="macro", zero_division=0)
    assert value("macro-f1", found, classes)[0] == pytest.approx(macro)
    assert value("matthews-correlation", found, classes)[0] == pytest.approx(matthews_corrcoef(wanted, predicted))
    if classes == 2:
        assert value("f1", found, 2)[0] == pytest.approx(f1_score(wanted, predicted, zero_division=0))


@pytest.mark.parametrize("name", ["f1", "macro-f1", "matthews-correlation"])
def test_the_bootstrap_is_one_over_examples(name: str) -> None:
    """Drawing cells of the confusion matrix gives the standard error that drawing examples gives; the seed is fixed."""
    random = np.random.default_rng(1)
    wanted = random.integers(0, 2, 120)
    predicted = np.where(random.random(120) < 0.8, wanted, 1 - wanted)
    metric = METRICS.find(name)()
    assert isinstance(metric, ClassMetric)
    found = metric.measure(answers(list(predicted), list(wanted)), 2)
    assert found == metric.measure(answers(list(predicted), list(wanted)), 2)
    drawn = [random.integers(0, 120, 120) for _ in range(1000)]
    plain = [metric.measure(answers(list(predicted[d]), list(wanted[d])), 2)[0] for d in drawn[:300]]
    assert found[1] == pytest.approx(np.std(plain, ddof=1), rel=0.15)


def test_standard_errors_of_means() -> None:
    found = answers([0, 1, 1, 1, 0], [0, 1, 0, 1, 1])
    right = np.array([1, 1, 0, 1, 0])
    assert value("accuracy", found, 2) == (0.6, pytest.approx(right.std(ddof=1) / 5**0.5))
    assert value("loss", found, 2) == (2.0, pytest.approx(np.arange(5).std(ddof=1) / 5**0.5))
    assert value("accuracy", answers([1], [1]), 2) == (1.0, None) == value("macro-f1", answers([1], [1]), 2)


def test_a_loss_is_a_mean_over_tokens() -> None:
    """Answers of 1 and 3 tokens; the error of a ratio, which the examples' spread around it makes."""
    found = Answers(np.array([1.0, 5.0, 3.0]), np.array([1, 3, 2]), np.array([True, False, True]))
    loss, error = value("loss", found, 1)
    assert loss == 1.5 and error == pytest.approx((3 / 2 * (0.25 + 0.25 + 0.0)) ** 0.5 / 6)
    assert value("exact-match", found, 1)[0] == pytest.approx(2 / 3)
    together = joined([found, found])
    assert len(together) == 6 and together.predicted is None and value("loss", together, 1)[0] == 1.5


def test_which_metrics_an_objective_has() -> None:
    classes, words = OBJECTIVES.find("sequence-classification")(), OBJECTIVES.find("causal-lm")()
    assert list(chosen_metrics((), classes, 3, "x")) == ["accuracy", "loss"]
    assert list(chosen_metrics((), words, 1, "x")) == ["loss", "exact-match"]
    assert list(chosen_metrics(("f1", "accuracy"), classes, 2, "x")) == ["f1", "accuracy"]
    with pytest.raises(RecipeError, match="f1 is not defined for sequence-classification with 3 classes, by which x"):
        chosen_metrics(("f1",), classes, 3, "x")
    with pytest.raises(RecipeError, match=r"unknown metric 'acuracy' .did you mean 'accuracy'"):
        chosen_metrics(("acuracy",), classes, 3, "x")
