"""Work cut into chunks that fit the processor's cache, shared out over threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

CHUNK = 1 << 19  # elements; measured: smaller ones cost calls, larger ones cache misses
SMALLEST_CHUNK = 1 << 14  # below this, calls cost more than arithmetic

Job = TypeVar("Job")


@dataclass(frozen=True)
class Chunk:
    """Elements first … first + count of the flattened tensor number `tensor`. index: its place among all chunks."""

    index: int
    tensor: int
    first: int
    count: int


def chunks_of(numels: Sequence[int], size: int = CHUNK) -> list[Chunk]:
    """Every element of tensors with these sizes exactly once, in order."""
    places = [(tensor, first) for tensor, numel in enumerate(numels) for first in range(0, numel, size)]
    return [
        Chunk(index, tensor, first, min(size, numels[tensor] - first)) for index, (tensor, first) in enumerate(places)
    ]


def worker_count() -> int:
    """Threads that may run at once on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(work: Callable[[Job], object], jobs: Iterable[Job], workers: int) -> None:
    """Call `work` on every job in `workers` threads; few jobs wait at a time. The first failure stops the rest."""
    queue: Iterator[Job] = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[object]] = set()
        try:
            for job in queue:
                running.add(pool.submit(work, job))
                if len(running) >= 4 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in running:
                future.result()
        finally:
            for future in running:
                future.cancel()
