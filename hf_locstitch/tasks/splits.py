"""Slices of splits, such as `train[:50%]`, and whether two of them may hold the same rows, of however many."""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

# As the data sets library has them: https://huggingface.co/docs/datasets/loading#slice-splits
SLICE = re.compile(
    r"(?P<name>\w+(?:\.\w+)*)"
    r"(?:\[(?P<first>-?[\d_]+%?)?:(?P<last>-?[\d_]+%?)?\])?"
    r"(?:\((?P<rounding>\w+)\))?"
)
EVERY = "all"  # the name of all splits together


class Bound(NamedTuple):
    """The row fixed + share · rows."""

    fixed: int
    share: int  # in hundredths

    def is_before(self, other: Bound) -> bool:
        """Whether it is never after another, however many rows there are."""
        return self.fixed <= other.fixed and self.share <= other.share


class Slice(NamedTuple):
    """first … last − 1 of a split. rounding: of shares, as named."""

    name: str
    first: Bound
    last: Bound
    rounding: str | None


def may_share_rows(one: str, other: str) -> bool:
    """Whether two splits of a data set may have rows in common.

    Args:
        one, other: As `split` has them: names, slices of them, or sums of these.

    Returns:
        False if they cannot; True also where that depends on how many rows there are.

    Example:
        >>> may_share_rows("train[:50%]", "train[50%:]"), may_share_rows("train[:50%]", "train[:100]")
        (False, True)
    """
    return any(_overlap(*pair) for pair in product(_slices(one), _slices(other)))


def whole(split: str) -> str:
    """The name of the split that a slice is of."""
    return split.partition("[")[0]


def _slices(split: str) -> list[Slice | None]:
    """None for one that is not understood."""
    return [_slice(part.strip()) for part in split.split("+")]


def _slice(text: str) -> Slice | None:
    if (found := SLICE.fullmatch(text)) is None:
        return None
    first = _bound(found["first"]) if found["first"] else Bound(0, 0)
    last = _bound(found["last"]) if found["last"] else Bound(0, 100)
    return Slice(found["name"], first, last, found["rounding"])


def _bound(text: str) -> Bound:
    """Counted from the end if it is negative."""
    number = int(text.rstrip("%"))
    if text.endswith("%"):
        return Bound(0, number if number >= 0 else 100 + number)
    return Bound(number, 0 if number >= 0 else 100)


def _overlap(one: Slice | None, other: Slice | None) -> bool:
    if one is None or other is None:
        return True
    if one.name != other.name and EVERY not in (one.name, other.name):
        return False
    if one.name != other.name or one.rounding != other.rounding:
        return True
    return not (one.last.is_before(other.first) or other.last.is_before(one.first))
