"""What localization, refits and judging need from data: examples, their weights, and the loss of a batch of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def no_outputs(model: Any, examples: Sequence[Any]) -> Tensor:
    """For a task that defines a loss only."""
    raise NotImplementedError("this task defines a loss only")


@dataclass(frozen=True)
class Task:
    """weights: units an example is averaged over: its answer's tokens, or 1. loss: (model, examples) -> their sum
    over those units, a scalar. outputs: (model, examples) -> what the loss is taken of, [units, numbers]; logits:
    whether these are logits of classes or tokens. targets: examples -> the right class or token of each unit, if known.
    """

    examples: Sequence[Any]
    weights: Sequence[int]
    loss: Callable[[Any, Sequence[Any]], Tensor]
    outputs: Callable[[Any, Sequence[Any]], Tensor] = no_outputs
    logits: bool = True
    targets: Callable[[Sequence[Any]], Sequence[int]] | None = None


@dataclass(frozen=True)
class MicroBatch:
    """factor: weight of its summed loss in the loss of the set."""

    examples: Sequence[Any]
    factor: float


def micro_batches(task: Task, size: int, batch: int | None = None) -> Iterator[MicroBatch]:
    """The whole set, `size` examples together, so that the weighted losses add up to the set's mean loss.

    batch: instead to the sum of the mean losses of batches of so many examples, as in the authors' code.
    """
    count = len(task.examples)
    batch = batch or count
    for first in range(0, count, batch):
        last = min(first + batch, count)
        total = sum(task.weights[first:last])
        for start in range(first, last, size):
            yield MicroBatch(task.examples[start : min(start + size, last)], 1 / total)


def batched(task: Task, first: int, last: int, size: int, most: float = math.inf) -> list[list[Any]]:
    """Batches of the examples first … last − 1, in order: up to `size` examples, of a total weight up to `most` unless
    one example alone exceeds it."""
    batches: list[list[Any]] = []
    total = 0
    for example, weight in zip(task.examples[first:last], task.weights[first:last], strict=True):
        if not batches or len(batches[-1]) == size or total + weight > most:
            batches.append([])
            total = 0
        batches[-1].append(example)
        total += weight
    return batches
