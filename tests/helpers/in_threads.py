"""Several processes' work in threads of one, taking turns: what they tell each other, without starting any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Lock
from typing import Any, TypeVar

import torch

from hf_locstitch.runtime.processes import Processes, divide
from hf_locstitch.stitch.fitting import FitJob

T = TypeVar("T")
S = TypeVar("S")


class Threads(Processes):
    """One of `count` threads that stand for processes. told, barrier, turn: shared by all of them; what they do
    together is done by one after the other, since libraries change the state of their process."""

    def __init__(self, rank: int, told: list[Any], barrier: Barrier, turn: Lock) -> None:
        super().__init__(rank, len(told))
        self._told, self._barrier, self._turn = told, barrier, turn

    def gather(self, value: T) -> list[T]:
        self._told[self.rank] = value
        self._barrier.wait()
        values = list(self._told)
        self._barrier.wait()
        return values

    def add_up(self, values: torch.Tensor) -> None:
        values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def share(self, work: Callable[[], T], say: Callable[[T], S]) -> tuple[T, list[S]]:
        try:
            with self._turn:
                result = work()
        except BaseException:
            self._barrier.abort()
            raise
        return result, self.gather(say(result))


def fit_in(count: int, fit: Callable[[FitJob], T]) -> Callable[[FitJob], T]:
    """`fit`, of a method, as so many processes would do it: each writes its own tensors."""

    def fitting(job: FitJob) -> T:
        told, barrier, turn = [None] * count, Barrier(count, timeout=300), Lock()
        names: Sequence[str] = sorted(job.own)
        owners = divide([1] * len(names), count)
        jobs = [
            replace(
                job,
                processes=Threads(rank, told, barrier, turn),
                own={name for name, owner in zip(names, owners, strict=True) if owner == rank},
            )
            for rank in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            first, *_ = pool.map(fit, jobs)
        return first

    return fitting
