"""Which of many are looked at: the same ones every time."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Literal, TypeVar

SEED = 0

Tensors = int | Literal["all"]
T = TypeVar("T", int, str)


def sample(known: Collection[T], count: Tensors) -> list[T]:
    """So many of them, sorted."""
    ordered = sorted(known)
    return ordered if count == "all" or count >= len(ordered) else sorted(Random(SEED).sample(ordered, count))
