"""Counting finds what sorting finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_locstitch.localize.kth_largest import Sizes, TopK, kth_largest, sortable


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.data())
def test_top_k_is_a_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    parts = [sortable(torch.tensor(part, dtype=torch.float32)) for part in (values[:cut], values[cut:])]
    top = TopK(kth_largest(lambda: parts, k))
    kept = np.concatenate([top.keep(part) for part in parts])
    assert kept.sum() == k
    inside, outside = np.array(values)[kept], np.array(values)[~kept]
    if 0 < k < len(values):
        assert inside.min() >= outside.max()


def test_ties_are_kept_evenly() -> None:
    keys = [sortable(torch.zeros(5)), sortable(torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0]))]
    top = TopK(kth_largest(lambda: keys, 5))
    kept = np.concatenate([top.keep(part) for part in keys])
    assert kept.tolist() == [False, True, False, True, False, True, True, False, False, True]


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_has_one_rank(value: float) -> None:
    assert sortable(torch.tensor([value]))[0] == 1 << 31


@settings(deadline=None)
@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=5), st.data())
def test_sizes_tell_the_kth_largest_nearly(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    sizes = Sizes()
    for value in values:
        sizes.add(torch.tensor([-value], dtype=torch.float32))
    kth, found = sorted(values)[-k], sizes.kth_largest(k)
    assert kth * (1 - 1 / 4096) - 2e-42 <= found <= kth  # the last bits of the smallest numbers are all they have


def test_sizes_of_too_few() -> None:
    sizes = Sizes()
    sizes.add(torch.tensor([2.0, 3.0]))
    assert sizes.kth_largest(2) == 2.0 and sizes.kth_largest(3) == 0.0
    assert sizes.kth_largest(4, lambda counts: 2 * counts) == 2.0
