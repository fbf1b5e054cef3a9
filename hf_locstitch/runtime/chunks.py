"""Work divided into chunks that fit the processor's cache, distributed over threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from hf_locstitch.runtime.processes import own_share

CHUNK = 1 << 20  # elements; measured: smaller ones cost calls, larger ones cache misses
SMALLEST_CHUNK = 1 << 14  # below this, calls cost more than arithmetic

Job = TypeVar("Job")
Result = TypeVar("Result")


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


def chunks_by_name(names: Sequence[str], chunks: Iterable[Chunk]) -> dict[str, list[Chunk]]:
    """The chunks of each tensor, in order. names: of the tensors that the chunks number."""
    by_name: dict[str, list[Chunk]] = {name: [] for name in names}
    for chunk in chunks:
        by_name[names[chunk.tensor]].append(chunk)
    return by_name


def worker_count() -> int:
    """Threads that this process may run at once: its share of the machine's processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return own_share(processors)


def keep_to_itself() -> None:
    """Initializes a compute thread. torch.set_num_threads takes effect in it only after a call of get_num_threads:
    before, a matrix product may run in parallel, and differ in its last digits from run to run.
    """
    if (torch := sys.modules.get("torch")) is not None:  # else torch is not used here
        torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Our threads divide the chunks; torch's own threads would compete with them: ten times slower under load."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_TURN = threading.local()  # in_vain: of the `for_each` that this thread works for


class InVain(Exception):
    """What a job of `for_each` waits for is no longer wanted."""


def check_wanted() -> None:
    """For jobs that wait long: raises InVain if the `for_each` of this thread has failed, or was interrupted."""
    in_vain: threading.Event | None = getattr(_TURN, "in_vain", None)
    if in_vain is not None and in_vain.is_set():
        raise InVain


def for_each(work: Callable[[Job], object], jobs: Iterable[Job], workers: int) -> None:
    """Call `work` on every job in `workers` threads, each taking the next job. The first failure stops the rest."""
    queue = iter(jobs)
    lock = threading.Lock()
    in_vain = threading.Event()

    def take_turns() -> None:
        _TURN.in_vain = in_vain
        try:
            while not in_vain.is_set():
                with lock:
                    job = next(queue, queue)
                if job is queue:
                    return
                work(job)  # type: ignore[arg-type]
        except BaseException:
            in_vain.set()
            raise

    with ThreadPoolExecutor(workers, initializer=keep_to_itself) as pool:
        try:
            for future in as_completed([pool.submit(take_turns) for _ in range(workers)]):
                with suppress(InVain):
                    future.result()
        except BaseException:
            in_vain.set()
            raise


def in_order(work: Callable[[Job], Result], items: Sequence[Job], workers: int) -> Iterator[Result]:
    """Results in the order of the items, computed a few at a time."""
    with ThreadPoolExecutor(workers, initializer=keep_to_itself) as pool:
        for first in range(0, len(items), workers):
            yield from pool.map(work, items[first : first + workers])
