"""Loops over the elements of a chunk, compiled; numpy and torch pass over the memory once for each of their steps.

Positions count from the chunk's start, ascending. Values come and go as their bits, in unsigned integers of their
size: one loop for all dtypes. The interpreter is left free meanwhile, so threads run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1 << 12  # elements looked at together; what is noted of them stays in the nearest cache
SURE = 1 << 31  # flag of a position whose score lies above the bracket
ESCAPE = 255  # in the gaps of a mask: so many zeros, and no one after them

Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.unsignedinteger[Any]]
Positions = npt.NDArray[np.int32]
Flagged = npt.NDArray[np.uint32]
Scores = npt.NDArray[np.int32]
Counts = npt.NDArray[np.uint8]

UNSIGNED = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}

Loop = TypeVar("Loop", bound=Callable[..., Any])


def bits(values: torch.Tensor) -> Bits:
    """The same memory as unsigned integers. values: [n], any float."""
    return values.view(UNSIGNED[values.element_size()]).numpy()


def _compiled(loop: Loop) -> Loop:
    """Compiled at the first call; kept beside this file, or in the user's cache folder, for the next process."""
    try:
        compiled = numba.njit(loop, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # neither place can be written to
        compiled = numba.njit(loop, nogil=True, error_model="numpy")
    return cast(Loop, compiled)


@_compiled
def _places(block: Any, least: int, flags: Counts, places: Positions) -> int:
    """Where the numbers of a block [≤ BLOCK] are at least so large. places: [BLOCK + 1], filled. Returns how many.

    flags: [BLOCK], overwritten.
    """
    for place in range(len(block)):
        flags[place] = block[place] >= least
    flags[len(block) :] = 0
    count = 0
    eights = flags.view(np.uint64)
    for eight in range(len(eights)):
        if eights[eight]:  # most are not, at the densities of masks
            for place in range(8 * eight, 8 * eight + 8):
                places[count] = place
                count += np.int64(flags[place])
    return count


@_compiled
def reaching(
    scores: Scores, low: int, high: int, values: Bits, flagged: Flagged, chosen: Bits, inside: Scores
) -> tuple[int, int, int]:
    """Fill in the candidates: those of the scores [n] that are at least `low`.

    flagged: their positions, flagged as SURE from `high` on. chosen: their values. inside: scores of those that are
    not sure. All [≥ n + 1]. Returns how many there are, how many are not sure, and the largest score.
    """
    count = open_ = 0
    largest = 0
    flags = np.empty(BLOCK, np.uint8)
    places = np.empty(BLOCK + 1, np.int32)
    for start in range(0, len(scores), BLOCK):
        block = scores[start : start + BLOCK]
        for at in range(_places(block, low, flags, places)):
            place = places[at]
            score = block[place]
            sure = score >= high
            flagged[count] = np.uint32(start + place) | (np.uint32(SURE) if sure else np.uint32(0))
            chosen[count] = values[start + place]
            inside[open_] = score
            count += 1
            open_ += np.int64(not sure)
            largest = max(largest, np.int64(score))
    return count, open_, int(largest)


@_compiled
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


@_compiled
def count_up(times: Counts, positions: Positions) -> None:
    """One more at each of the positions."""
    for position in positions:
        times[position] += np.uint8(1)


@_compiled
def more_than(times: Counts, least: int, positions: Positions) -> int:
    """Fill in where a count [n] is larger than `least`. positions: [≥ n + 1]. Returns how many there are."""
    count = 0
    flags = np.empty(BLOCK, np.uint8)
    places = np.empty(BLOCK + 1, np.int32)
    for start in range(0, len(times), BLOCK):
        for at in range(_places(times[start : start + BLOCK], least + 1, flags, places)):
            positions[count] = start + places[at]
            count += 1
    return count


@_compiled
def put(target: Bits, positions: Positions, values: Bits) -> None:
    """target[positions] = values."""
    for at in range(len(positions)):
        target[positions[at]] = values[at]


@_compiled
def find(positions: Positions, wanted: Positions, taken: Positions, slots: Positions) -> int:
    """Fill in which of the positions are `wanted`, and as the how manieth. Returns how many are."""
    count = slot = 0
    for at in range(len(positions)):
        while slot < len(wanted) and wanted[slot] < positions[at]:
            slot += 1
        if slot < len(wanted) and wanted[slot] == positions[at]:
            taken[count] = at
            slots[count] = slot
            count += 1
    return count


@_compiled
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
