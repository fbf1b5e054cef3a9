"""Several processes' work in threads of one, taking turns: what they tell each other, without starting any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Lock
from typing import Any, TypeVar

import torch

from helpers.ranks import Rank
from hf_locstitch.runtime.processes import divide
from hf_locstitch.stitch.fitting import FitJob

T = TypeVar("T")
S = TypeVar("S")


class TakingTurns(Rank):
    """What they do together is done by one after the other, since libraries change the state of their process. turn:
    common to all."""

    def __init__(self, rank: int, told: list[Any], barrier: Barrier, turn: Lock) -> None:
        super().__init__(rank, len(told), barrier, told)
        self._turn = turn

    def add_up(self, values: torch.Tensor) -> None:
        values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def share(self, work: Callable[[], T], say: Callable[[T], S]) -> tuple[T, list[S]]:
        try:
            with self._turn:
                result = work()
        except BaseException:
            self._meeting.abort()
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
                processes=TakingTurns(rank, told, barrier, turn),
                own={name for name, owner in zip(names, owners, strict=True) if owner == rank},
            )
            for rank in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            first, *_ = pool.map(fit, jobs)
        return first

    return fitting
