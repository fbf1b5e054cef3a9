"""Brackets that rise while scores arrive, in one process or in several that tell each other what they have seen."""

from __future__ import annotations

import numpy as np

from hf_locstitch.localize.bracket import RisingBracket


def test_several_rise_as_one_that_sees_everything() -> None:
    """Bins are of the upper 16 bits. Of 100 scores in bins 1 to 10, the 12 largest reach bin 9."""
    scores = (np.repeat(np.arange(1, 11), 10) << 16).astype(np.int32)
    one = RisingBracket(12, 1000)
    one.see(scores, 500)
    assert one.low == 9 << 16 and one.reaching == 20

    parts = [RisingBracket(12, 1000) for _ in range(2)]
    for bracket, own in zip(parts, (scores[:93], scores[93:]), strict=True):
        bracket.see(own, 250)
    assert [bracket.low >> 16 for bracket in parts] == [9, 0]  # 13 of the first reach bin 9; the second has seen 7
    seen = np.sum([bracket.seen for bracket in parts], axis=0)
    for bracket in parts:
        bracket.rise(seen)
    assert [bracket.low for bracket in parts] == [one.low] * 2
    assert [bracket.reaching for bracket in parts] == [13, 7]
