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
ROWS = "rows"
EVERY = "all"  # the name of all splits together


class Bound(NamedTuple):
    """The row fixed + round(share · rows), counted from the end if `back`; share is in hundredths."""

    fixed: int = 0
    share: int = 0
    back: bool = False

    def is_before(self, other: Bound) -> bool:
        """Whether it is never after another, however many rows there are."""
        if self.share * other.share < 0:  # 90 % from the start and 10 % from the end are rounded apart
            return False
        whole, others = 100 * self.back + self.share, 100 * other.back + other.share
        return self.fixed <= other.fixed and whole <= others


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


def of_file(split: str) -> str | None:
    """The same slices of a split named `rows`: a file has one split, whatever it is called.

    None if these are slices of several, or not understood.

    Example:
        >>> of_file("test[:50%]"), of_file("train+test")
        ('rows[:50%]', None)
    """
    parts = [part.strip() for part in split.split("+")]
    names = [part.name if part else None for part in map(_slice, parts)]
    if None in names or len({*names}) > 1:
        return None
    return "+".join(ROWS + part[len(str(names[0])) :] for part in parts)


def may_share_rows_of_file(one: str | None, other: str | None) -> bool:
    """As may_share_rows, of a file; None: all of it."""
    return may_share_rows(of_file(one or ROWS) or ROWS, of_file(other or ROWS) or ROWS)


def _slices(split: str) -> list[Slice | None]:
    """None for one that is not understood."""
    return [_slice(part.strip()) for part in split.split("+")]


def _slice(text: str) -> Slice | None:
    if (found := SLICE.fullmatch(text)) is None:
        return None
    shares = any(end and end.endswith("%") for end in (found["first"], found["last"]))  # if one is, both are
    first = _bound(found["first"], shares) if found["first"] else Bound()
    last = _bound(found["last"], shares) if found["last"] else Bound(back=True)
    return Slice(found["name"], first, last, found["rounding"])


def _bound(text: str, share: bool) -> Bound:
    """Counted from the end if it is negative."""
    number = int(text.rstrip("%"))
    return Bound(share=number, back=number < 0) if share else Bound(number, back=number < 0)


def _overlap(one: Slice | None, other: Slice | None) -> bool:
    if one is None or other is None:
        return True
    if one.name != other.name and EVERY not in (one.name, other.name):
        return False
    if one.name != other.name or one.rounding != other.rounding:
        return True
    return not (one.last.is_before(other.first) or other.last.is_before(one.first))
