"""Loops over the elements of a chunk, compiled; numpy passes over the memory once for each of its steps.

Positions count from the chunk's start, ascending. Values come and go as their bits, in unsigned integers of their
size: one loop for all dtypes. The interpreter is left free meanwhile, so threads run side by side.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from hf_locstitch.runtime.compiling import compiled
from hf_locstitch.runtime.dtypes import DTYPE, Values

BLOCK = 1 << 12  # elements examined together; their flags stay in the L1 cache
SURE = 1 << 31  # flag of a position whose score lies above the bracket
ESCAPE = 255  # in the gaps of a mask: 255 zeros, not followed by a one

Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.unsignedinteger[Any]]
Positions = npt.NDArray[np.int32]
Flagged = npt.NDArray[np.uint32]
Scores = npt.NDArray[np.int32]
Counts = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Found = tuple[Flagged, Bits, Scores]  # positions, values, scores of candidates; see `reaching`

GATHER = np.uint64(0x0102040810204080)  # times eight flags, which are bytes: their bits, in the uppermost byte
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)  # times a power of two: another number in the uppermost six bits for each,
WHICH = np.argsort([(int(DE_BRUIJN) << bit) % 2**64 >> 58 for bit in range(64)]).astype(np.uint8)  # and the power of it

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
# How a loop tells dtypes apart whose bits come in the same integers.
F64, F32, F16, BF16 = range(4)
KIND = {DTYPE["F64"]: F64, DTYPE["F32"]: F32, DTYPE["F16"]: F16, DTYPE["BF16"]: BF16}


def bits(values: Values) -> Bits:
    """The same memory as unsigned integers. values: [n], any float."""
    return values.view(UNSIGNED[values.itemsize])


@compiled
def _places(block: Any, least: int, flags: Counts, places: Positions) -> int:
    """Where the numbers of a block [≤ BLOCK] are at least so large. places: [BLOCK + 1], filled. Returns how many.

    flags: [BLOCK], overwritten.
    """
    for place in range(len(block)):
        flags[place] = block[place] >= least
    flags[len(block) :] = 0
    count = 0
    eights = flags.view(np.uint64)
    for first in range(0, len(eights), 8):
        ones = np.uint64(0)
        for at in range(8):
            ones |= eights[first + at] * GATHER >> np.uint64(56) << np.uint64(8 * at)
        while ones:  # few, at the densities of masks
            lowest = ones & (~ones + np.uint64(1))
            places[count] = 8 * first + WHICH[lowest * DE_BRUIJN >> np.uint64(58)]
            ones ^= lowest
            count += 1
    return count


@numba.njit(inline="always")  # else the choice between the kinds stays within the loops
def _number(value: Any, kind: int) -> Any:
    """The value of one element, from its bits, in float32."""
    if kind == BF16:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    if kind == F16:
        bits = np.uint32(value)
        size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
        # The difference of the exponent biases; right for subnormal numbers, too, but not for infinity and NaN.
        wide = np.float32(size * np.float32(2.0**112)).view(np.uint32)
        full = np.uint32(0x7F800000) if bits & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
        return np.uint32(wide | full | (bits & np.uint32(0x8000)) << np.uint32(16)).view(np.float32)
    if kind == F32:
        return np.uint32(value).view(np.float32)
    return np.float32(np.uint64(value).view(np.float64))


@numba.njit(inline="always")
def _sizes(finetuned: Bits, finetuned_kind: int, base: Bits, base_kind: int, scores: Scores) -> None:
    for at in range(len(finetuned)):
        difference = np.float32(_number(finetuned[at], finetuned_kind) - _number(base[at], base_kind))
        scores[at] = difference.view(np.int32) & np.int32(0x7FFFFFFF)


@compiled
def sizes(finetuned: Bits, finetuned_kind: int, base: Bits, base_kind: int, scores: Scores) -> None:
    """Bits of |finetuned − base| in float32. All [n]; scores: filled; kinds: of KIND."""
    if finetuned_kind == BF16 and base_kind == BF16:  # what most models are: a loop without any choice
        _sizes(finetuned, BF16, base, BF16, scores)
    else:
        _sizes(finetuned, finetuned_kind, base, base_kind, scores)


@compiled
def _take(
    block: Scores, start: int, low: int, high: int, values: Bits, flags: Counts, places: Positions,
    found: Found, counts: Ints,
) -> None:  # fmt: skip
    """Add the candidates of a block of scores, the first of which is number `start`. counts: as `reaching` returns."""
    flagged, chosen, inside = found
    count, open_, largest = counts
    for at in range(_places(block, low, flags, places)):
        place = np.uint32(places[at])
        score = block[place]
        sure = np.uint32(score >= high)
        flagged[count] = np.uint32(start) + place | sure << np.uint32(31)
        chosen[count] = values[np.uint32(start) + place]
        inside[open_] = score
        count += 1
        open_ += 1 - np.int64(sure)
        largest = max(largest, np.int64(score))
    counts[0], counts[1], counts[2] = count, open_, largest


@compiled
def reaching(scores: Scores, low: int, high: int, values: Bits, found: Found) -> Ints:
    """Fill in the candidates: those of the scores [n] that are at least `low`.

    found: their positions, flagged as SURE from `high` on; their values; scores of those that are not sure. All
    [≥ n + 1]. Returns how many there are, how many are not sure, and the largest score.
    """
    counts = np.zeros(3, np.int64)
    flags, places = np.empty(BLOCK, np.uint8), np.empty(BLOCK + 1, np.int32)
    for start in range(0, len(scores), BLOCK):
        _take(scores[start : start + BLOCK], start, low, high, values, flags, places, found, counts)
    return counts


@compiled
def candidates(
    finetuned: Bits, finetuned_kind: int, base: Bits, base_kind: int, low: int, high: int,
    found: Found,
) -> Ints:  # fmt: skip
    """As `reaching`, of the scores that `sizes` finds: the memory is passed over once."""
    counts = np.zeros(3, np.int64)
    flags, places = np.empty(BLOCK, np.uint8), np.empty(BLOCK + 1, np.int32)
    scores = np.empty(BLOCK, np.int32)
    for start in range(0, len(finetuned), BLOCK):
        end = min(start + BLOCK, len(finetuned))
        block = scores[: end - start]
        sizes(finetuned[start:end], finetuned_kind, base[start:end], base_kind, block)
        _take(block, start, low, high, finetuned, flags, places, found, counts)
    return counts


@compiled
def among(flagged: Flagged, values: Bits, wanted: Bools, positions: Positions, chosen: Bits) -> int:
    """Of the candidates [m], fill in those that are sure and, of the others, the `wanted`. Returns how many."""
    count = open_ = 0
    for at in range(len(flagged)):
        positions[count] = np.int32(flagged[at] & np.uint32(SURE - 1))
        chosen[count] = values[at]
        if flagged[at] >= np.uint32(SURE):
            count += 1
        else:
            count += np.int64(wanted[open_])
            open_ += 1
    return count


@compiled
def count_up(times: Counts, positions: Positions) -> None:
    """Add one at each of the positions."""
    for position in positions:
        times[position] += np.uint8(1)


@compiled
def more_than(times: Counts, least: int, positions: Positions) -> int:
    """Fill in the positions where a count [n] exceeds `least`. positions: [≥ n + 1]. Returns how many there are."""
    count = 0
    flags = np.empty(BLOCK, np.uint8)
    places = np.empty(BLOCK + 1, np.int32)
    for start in range(0, len(times), BLOCK):
        for at in range(_places(times[start : start + BLOCK], least + 1, flags, places)):
            positions[count] = start + places[at]
            count += 1
    return count


@compiled
def put(target: Bits, positions: Positions, values: Bits) -> None:
    """target[positions] = values."""
    for at in range(len(positions)):
        target[positions[at]] = values[at]


@compiled
def find(positions: Positions, times: Counts, least: int, wanted: Positions, taken: Positions, slots: Positions) -> int:
    """Fill in which of the positions have a count larger than `least`, and the index of each among all that have.

    wanted: those, of whatever origin; see `more_than`. taken, slots: [≥ positions + 1]. Returns how many there are.
    """
    count = slot = 0
    for at in range(len(positions)):
        taken[count] = at
        count += np.int64(times[positions[at]] > least)
    for at in range(count):
        position = positions[taken[at]]
        while wanted[slot] < position:
            slot += 1
        slots[at] = slot
    return count


@compiled
def gaps(positions: Positions, last: int, content: Counts) -> int:
    """Fill in the zeros before each of the positions, the first counted from after `last`; see masks.py.

    content: large enough. Returns how many bytes there are.
    """
    count = 0
    for position in positions:
        gap = np.int64(position) - last - 1
        while gap >= ESCAPE:
            content[count] = ESCAPE
            gap -= ESCAPE
            count += 1
        content[count] = gap
        count += 1
        last = position
    return count


@compiled
def ones(content: Counts, last: int, positions: Ints) -> Ints:
    """Fill in the positions that gaps stand for, the first counted from after `last`: the inverse of `gaps`.

    positions: [≥ gaps]. Returns how many there are, and after which position the next gap counts.
    """
    count = 0
    for gap in content:
        last += np.int64(gap)
        if gap != ESCAPE:
            last += 1
            positions[count] = last
            count += 1
    return np.array([count, last])
