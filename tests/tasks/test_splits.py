"""Whether slices of a split share rows is what reading them says."""

from __future__ import annotations

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_locstitch.tasks.splits import may_share_rows, of_file, whole

BOUND = st.one_of(st.just(""), st.integers(-12, 12).map(str), st.integers(-10, 10).map(lambda tenth: f"{10 * tenth}%"))
SPLIT = st.one_of(st.just("train"), st.tuples(BOUND, BOUND).map(lambda ends: f"train[{ends[0]}:{ends[1]}]"))


def rows(split: str, count: int) -> set[int]:
    """As datasets counts them."""
    (found,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": count})
    return set(range(found.from_ or 0, found.to if found.to is not None else count))


@given(SPLIT, SPLIT, st.sampled_from([12, 13, 15, 40, 97]))
@example("train[:90%]", "train[-10%:]", 15)  # rounded to 14 and 13
@example("train[:-10%](pct1_dropremainder)", "train[90%:](pct1_dropremainder)", 150)
@example("train[:10]", "train[10:50%]", 40)  # from 10 %
def test_slices_that_share_no_row_never_do(one: str, other: str, count: int) -> None:
    if not may_share_rows(one, other):
        assert not rows(one, count) & rows(other, count)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train[:50%]", "train[50%:]", False),
        ("train[:-100]", "train[-100:]", False),
        ("train[:100]", "train[100:200]", False),
        ("train[:101]", "train[100:200]", True),
        ("train[:10%]+test", "train[90%:]+validation", False),
        ("train[:10%]+test", "train[90%:]+test[:5]", True),
        ("train[:10]", "train[50%:]", True),  # if there are less than twenty
        ("train[-20%:-10%]", "train[-10%:]", False),
        ("train[:50%]", "train[50%:](pct1_dropremainder)", True),
        ("all", "test", True),
        ("what[ever", "train", True),
    ],
)
def test_known_ones(one: str, other: str, shared: bool) -> None:
    assert may_share_rows(one, other) == may_share_rows(other, one) == shared
    assert whole("train[:10%]") == "train"


def test_a_file_has_one_split_whatever_it_is_called() -> None:
    assert of_file("test[:50%]") == "rows[:50%]" and of_file("all") == "rows"
    assert of_file("train[:3]+ train[-2:]") == "rows[:3]+rows[-2:]"
    assert of_file("train+test") is None and of_file("my-split") is None
