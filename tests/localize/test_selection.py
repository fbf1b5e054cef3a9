"""The tie rule, the bound, the exact decimal: by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch import Magnitude
from hf_locstitch.localize.bracket import BINS, NON_FINITE, histogram_bracket, sample_bracket
from hf_locstitch.localize.candidates import differing, magnitude_scores
from hf_locstitch.localize.selection import evenly
from hf_locstitch.runtime.dtypes import DTYPE
from hf_locstitch.runtime.shares import exact_share


def test_evenly_by_hand() -> None:
    # r = 2 of T = 5: ⌊(j+1)·2/5⌋ = 0 0 1 1 2, ⌊j·2/5⌋ = 0 0 0 1 1
    assert evenly(0, 5, 2, 5).tolist() == [False, False, True, False, True]
    assert evenly(3, 2, 2, 5).tolist() == [False, True]


@given(st.data())
def test_evenly_keeps_r_of_t_however_it_is_cut(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 300))
    keep = data.draw(st.integers(0, total))
    cut = data.draw(st.integers(0, total))
    kept = np.concatenate([evenly(0, cut, keep, total), evenly(cut, total - cut, keep, total)])
    assert kept.sum() == keep
    expected = [(j + 1) * keep // total > j * keep // total for j in range(total)]
    assert kept.tolist() == expected


def test_evenly_where_products_pass_64_bits() -> None:
    total, keep, first = 7_900_000_001, 7_899_999_999, 7_899_990_000
    expected = [(j + 1) * keep // total > j * keep // total for j in range(first, first + 10_001)]
    assert evenly(first, 10_001, keep, total).tolist() == expected


@pytest.mark.parametrize(
    ("density", "n", "k"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.1, 30, 3), (0.07, 100, 7), (1.0, 7, 7), (0.0, 7, 0), (1e-9, 10**9, 1),
     (0.05, 6_979_584_000, 348_979_200), (0.3, 9, 2)],
)  # fmt: skip
def test_the_share_is_that_of_the_decimal_written(density: float, n: int, k: int) -> None:
    assert exact_share(density, n) == k


def test_groups() -> None:
    assert Magnitude(density=0.5).groups([3, 4]) == [([0, 1], 3)]
    assert Magnitude(density=0.5, scope="tensor").groups([3, 4]) == [([0], 1), ([1], 2)]
    assert Magnitude(density=0.5, scope="tensor").kept([3, 4]) == 3


@given(st.lists(st.floats(0, 100, width=32), min_size=200, max_size=400), st.data())
def test_a_histogram_brackets_the_kth_largest(scores: list[float], data: st.DataObject) -> None:
    bits = np.array(scores, dtype=np.float32).view(np.int32)
    k = data.draw(st.integers(1, len(bits)))
    bracket = histogram_bracket(np.bincount(bits >> 16, minlength=BINS), k)
    assert bracket.low <= np.sort(bits)[-k] < bracket.high


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("uneven", [False, True])
def test_a_sample_brackets_the_kth_largest_closely(share: float, uneven: bool) -> None:
    generator = np.random.default_rng(1)
    scores = np.abs(generator.standard_normal((4000, 128))).astype(np.float32)
    if uneven:  # layers differ
        scores *= np.linspace(0.5, 2, 4000, dtype=np.float32)[:, None]
    bits = scores.view(np.int32)
    k = int(share * bits.size)
    bracket = sample_bracket(bits[::8], k, bits.size)
    ordered = np.sort(bits, axis=None)
    assert bracket.low <= ordered[-k] < bracket.high
    assert (bits >= bracket.low).sum() <= 2.2 * k + 300


def test_a_sample_that_tells_nothing_brackets_everything() -> None:
    bracket = sample_bracket(np.zeros((10, 4), dtype=np.int32), 20, 40)
    assert bracket.low == 0


def test_scores_are_the_bits_of_the_float32_difference() -> None:
    base = np.array([1.0, -2.0, 0.5], np.float32)
    finetuned = np.array([1.5, -2.0, -0.5], DTYPE["BF16"])
    scores = magnitude_scores(finetuned, base)
    assert scores.view(np.float32).tolist() == [0.5, 0.0, 1.0]
    nan = magnitude_scores(np.array([np.nan, -np.inf], np.float32), base[:2])
    assert (nan >= NON_FINITE).all()


def test_differing_bits_tells_zeros_apart() -> None:
    base = np.array([0.0, 0.0, 1.0], np.float32)
    for dtype in ("F32", "BF16", "F64"):
        finetuned = np.array([0.0, -0.0, 1.0], DTYPE[dtype])
        assert differing(finetuned, base).tolist() == [False, True, False]
    assert differing(np.array([1.0 + 1e-12]), base[2:]).tolist() == [True]
