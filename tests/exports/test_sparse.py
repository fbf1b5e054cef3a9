"""Which layers of an adapter are stored by entries, and the entries themselves."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch.exports.adapter_weights import deltas_at, padded
from hf_locstitch.exports.sparse_layout import Linear, best_rank


def test_one_rank_for_all_layers_makes_the_adapter_smallest() -> None:
    few = Linear(rows=100, columns=100, ones=150, whole_bytes=40_000)  # rank 1: 200 entries of 8 bytes
    many = Linear(rows=100, columns=100, ones=4_500, whole_bytes=40_000)  # rank 23: 4,600 entries, 36,800 bytes
    assert (few.rank, many.rank, many.nbytes(23)) == (1, 23, 36_800)
    assert best_rank([few]) == 1 and best_rank([many]) == 23
    assert best_rank([few, many]) == 1  # 1,600 + 40,000 bytes; of rank 23 it would be 73,600
    assert best_rank([few, many, many, many]) == 1
    assert best_rank([Linear(100, 100, 5_500, 40_000)]) == 0  # 5,600 entries are larger than the layer


def test_what_does_not_fit_into_a_layer_is_no_rank_of_it() -> None:
    narrow = Linear(rows=2, columns=400, ones=500, whole_bytes=10**9)  # rank 2: more entries than weights
    assert narrow.rank == 2 and not narrow.fits(2) and best_rank([narrow]) == 0
    assert Linear(rows=1 << 15, columns=8, ones=1, whole_bytes=1).index_bytes == 2
    assert Linear(rows=8, columns=(1 << 15) + 1, ones=1, whole_bytes=1).index_bytes == 4


@given(st.sets(st.integers(0, 40), max_size=30), st.integers(0, 11))
def test_padding_takes_other_places(positions: set[int], more: int) -> None:
    given_ = np.array(sorted(positions), np.int64)
    found = padded(given_, len(given_) + more)
    assert len(found) == len(given_) + more and positions <= {*found.tolist()}
    assert (np.diff(found) > 0).all() and (not len(found) or found[-1] <= 41)


def test_deltas_add_up_to_the_goal_or_are_counted() -> None:
    before = torch.tensor([1.0, -0.0, 3.0, 1e8, 2.0])
    after = torch.tensor([1.5, -0.0, float("nan"), 1.25, 2.0])
    deltas, off = deltas_at(before, after, torch.arange(5))
    assert off == 1  # 1e8 + (1.25 − 1e8) is 0 in float32
    assert torch.equal((before + deltas)[[0, 1, 4]], after[[0, 1, 4]])
    assert torch.signbit(before + deltas)[1]
    deltas, off = deltas_at(before.bfloat16(), after.bfloat16(), torch.tensor([0, 1, 4]))
    assert off == 0 and deltas.dtype == torch.float32
