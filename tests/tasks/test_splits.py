"""Whether slices of a split share rows is what reading them says."""

from __future__ import annotations

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch.tasks.splits import may_share_rows, whole

BOUND = st.one_of(st.just(""), st.integers(-12, 12).map(str), st.integers(-10, 10).map(lambda tenth: f"{10 * tenth}%"))
SPLIT = st.one_of(st.just("train"), st.tuples(BOUND, BOUND).map(lambda ends: f"train[{ends[0]}:{ends[1]}]"))


def rows(split: str, count: int) -> set[int]:
    """As datasets counts them."""
    (found,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": count})
    return set(range(found.from_ or 0, found.to if found.to is not None else count))


@given(SPLIT, SPLIT, st.sampled_from([12, 13, 40, 97]))
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
        ("train[:50%]", "train[50%:](pct1_dropremainder)", True),
        ("all", "test", True),
        ("what[ever", "train", True),
    ],
)
def test_known_ones(one: str, other: str, shared: bool) -> None:
    assert may_share_rows(one, other) == may_share_rows(other, one) == shared
    assert whole("train[:10%]") == "train"
