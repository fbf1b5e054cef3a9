"""The mean under the masks: weights by hand and by property."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch.artifacts.mask_source import MaskedValues
from hf_locstitch.runtime.dtypes import DTYPE, Values
from hf_locstitch.stitch.mean import coverage, overlaps
from hf_locstitch.stitch.mean import stitch as stitch_covered


def masked_values(positions: list[int], values: list[float]) -> MaskedValues:
    return MaskedValues(np.array(positions, dtype=np.int32), np.array(values, np.float32))


def stitch(base: Values, models: list[MaskedValues], scale: float = 1.0) -> Values:
    return stitch_covered(base, models, coverage(len(base), models), scale=scale)


def test_by_hand() -> None:
    base = np.array([10.0, 20.0, 30.0, 40.0], np.float32)
    one, two = masked_values([0, 1], [1.0, 2.0]), masked_values([1, 3], [4.0, 8.0])
    assert stitch(base, [one, two]).tolist() == [1.0, 3.0, 30.0, 8.0]
    assert base.tolist() == [10.0, 20.0, 30.0, 40.0]
    assert coverage(4, [one, two]).times.tolist() == [1, 2, 0, 1]


def test_overlaps_by_hand() -> None:
    models = [masked_values([0], [4.0]), masked_values([0, 1], [10.0, 20.0])]
    times, pairs = overlaps(coverage(2, models), models)
    assert times.tolist() == [0, 1, 1] and pairs.tolist() == [[1, 1], [1, 2]]


def test_scale() -> None:
    base = np.array([10.0, 20.0, 30.0], np.float32)
    merged = stitch(base, [masked_values([0, 1], [0.0, 24.0]), masked_values([1], [26.0])], scale=0.5)
    assert merged.tolist() == [5.0, 22.5, 30.0]


def test_the_mean_is_rounded_once() -> None:
    base = np.zeros(1, DTYPE["BF16"])
    values = [1.0, 1.0078125, 1.0078125]  # neighbours in bfloat16; their mean 1.0052… rounds to the upper one
    merged = stitch(base, [masked_values([0], [value]) for value in values])
    assert merged.item() == 1.0078125


def test_minus_zero_stays() -> None:
    base = np.ones(2, np.float32)
    merged = stitch(base, [masked_values([0, 1], [-0.0, -0.0]), masked_values([1], [-0.0])])
    assert np.signbit(merged).all()


@pytest.mark.parametrize("count", range(1, 6))
def test_weights_sum_to_one_where_covered(count: int) -> None:
    """Stitching models that are all ones into a base of zeros shows the sum of the weights."""
    generator = np.random.default_rng(count)
    masks = [np.flatnonzero(generator.random(500) < 0.3) for _ in range(count)]
    ones = [masked_values(mask.tolist(), [1.0] * len(mask)) for mask in masks]
    weights = stitch(np.zeros(500, np.float32), ones)
    covered = np.zeros(500)
    for mask in masks:
        covered[mask] = 1
    assert weights.tolist() == covered.tolist()


@given(st.data())
def test_order_does_not_matter_to_the_sum(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 4))
    values = st.floats(-1e3, 1e3, width=32)
    models = [masked_values([0, 1], data.draw(st.lists(values, min_size=2, max_size=2))) for _ in range(count)]
    results = [stitch(np.zeros(2, np.float32), list(order)) for order in itertools.permutations(models)]
    assert all(np.array_equal(result, results[0]) for result in results)
