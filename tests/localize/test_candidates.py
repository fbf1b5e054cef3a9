"""Candidates of a chunk: by hand, and the same bits whatever finds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hf_locstitch.localize.bracket import ABOVE_ALL, FixedBracket
from hf_locstitch.localize.candidates import CandidateFinder, magnitude_scores
from hf_locstitch.runtime import kernels
from hf_locstitch.runtime.dtypes import DTYPE
from hf_locstitch.runtime.kernels import SURE

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(*numbers: float) -> list[int]:
    return np.array(numbers, np.float32).view(np.int32).tolist()


def bracket(low: float, high: float) -> FixedBracket:
    return FixedBracket(*bits(low, high))


def test_by_hand() -> None:
    finder = CandidateFinder(8)
    finder.begin(np.array([1.0, 2.0, 0.0, -1.0], np.float32))
    finetuned = np.array([1.5, 2.0, -0.0, -3.0], np.float32)
    found, largest = finder.find(finetuned, bracket(0.5, 1.0))
    assert found.positions.tolist() == [0, 3] and found.values.tolist() == [1.5, -3.0]
    assert found.sure.tolist() == [False, True] and found.scores.tolist() == bits(0.5) and largest == bits(2.0)[0]
    found, _ = finder.find(finetuned, bracket(0.6, 3.0))
    assert found.positions.tolist() == [3] and found.scores.tolist() == bits(2.0)
    found, _ = finder.find(finetuned, FixedBracket(0, ABOVE_ALL))  # −0 differs from 0 in a bit
    assert found.positions.tolist() == [0, 2, 3] and found.scores.tolist() == bits(0.5, 0.0, 2.0)


@given(scores=st.lists(st.integers(0, 40), max_size=9000), low=st.integers(1, 41), more=st.integers(0, 41))
@example(scores=[9] * 8193, low=9, more=0)
def test_reaching_at_any_length(scores: list[int], low: int, more: int) -> None:
    """Against numpy: blocks that are full, half full and empty."""
    given_, values = np.array(scores, np.int32), np.arange(len(scores), dtype=np.uint16)
    high = low + more
    flagged, chosen, inside = (np.empty(len(scores) + 1, dtype) for dtype in (np.uint32, np.uint16, np.int32))
    count, open_, largest = kernels.reaching(given_, low, high, values, (flagged, chosen, inside))
    places = np.flatnonzero(given_ >= low)
    assert (flagged[:count] & (SURE - 1)).tolist() == places.tolist() == chosen[:count].tolist()
    assert (flagged[:count] >= SURE).tolist() == (given_[places] >= high).tolist()
    assert inside[:open_].tolist() == [score for score in scores if low <= score < high]
    assert largest == given_[places].max(initial=0)


@pytest.mark.parametrize("base_dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_sizes_of_every_number(dtype: str, base_dtype: str) -> None:
    """Against numpy's own casts, over every bit pattern of the narrow dtypes."""
    every = np.arange(1 << 16, dtype=np.uint16)
    generator = np.random.default_rng(0)
    patterns = {
        2: every,
        4: every.astype(np.uint32) << 16 | every[::-1],
        8: generator.integers(0, 1 << 64, 1 << 16, np.uint64),
    }
    finetuned, base = (patterns[DTYPE[name].itemsize].view(DTYPE[name]) for name in (dtype, base_dtype))
    for start in (base, np.zeros_like(base)):
        with np.errstate(all="ignore"):
            due = np.abs(finetuned.astype(np.float32) - start.astype(np.float32))
        found = magnitude_scores(finetuned, start).view(np.float32)
        assert np.array_equal(found, due, equal_nan=True) and not np.signbit(found).any()
