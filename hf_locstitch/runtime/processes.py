"""The processes that work on one merge: one alone, or those that torchrun or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from hf_locstitch.errors import RequestError, WorkError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")
Counts = npt.NDArray[np.int64]


class Processes:
    """This process among `count`. All collective calls are made by every process, in the same order."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, creates folders and publishes."""
        return self.rank == 0

    @property
    def of_node(self) -> tuple[int, int]:
        """This process's rank among those of its machine, and how many these are."""
        return int(os.environ.get("LOCAL_RANK", self.rank)), local_count()

    def own(self, number: int) -> slice:
        """This process's part of `number` items: parts are contiguous and about equal."""
        return slice(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def sum(self, counts: Counts) -> Counts:
        """Elementwise over all processes, exactly. counts: int64 of one shape everywhere."""
        return counts

    def add_up(self, values: Tensor) -> None:
        """Replace floating-point values by their sum over all processes, the same bits in each."""

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        return [value]

    def share(self, work: Callable[[], T], say: Callable[[T], S]) -> tuple[T, list[S]]:
        """Do `work` in every process and wait for all. Returns its result here, and `say(result)` of every process, in
        order of rank; the first error of any process is raised in all.
        """
        result = work()
        return result, [say(result)]

    def together(self, work: Callable[[], T]) -> T:
        """As `share`, without the results of other processes."""
        return self.share(work, lambda _: None)[0]

    def end(self) -> None:
        """Wait for all and shut down; after an error the launcher ends the others."""

    def leave(self) -> None:
        """After an error raised in all, wait for all: the launcher kills processes still cleaning up once the first has
        exited.
        """

    def on_first(self, work: Callable[[], None]) -> None:
        """Do `work` in the first process while the others wait; its error is raised in each."""
        self.together(lambda: work() if self.first else None)


class DistributedProcesses(Processes):
    """Through Accelerate's PartialState, which knows the launchers, devices and backends."""

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        # Others wait while one downloads or uploads, for hours: of a process that died the launcher ends all.
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        super().__init__(self._state.process_index, self._state.num_processes)
        self._failed = False  # whether the last shared work failed

    def sum(self, counts: Counts) -> Counts:
        import torch

        on_device = torch.from_numpy(np.ascontiguousarray(counts)).to(self._state.device)
        torch.distributed.all_reduce(on_device)
        return on_device.cpu().numpy()

    def add_up(self, values: Tensor) -> None:
        import torch

        wide = values.to(self._state.device, torch.promote_types(values.dtype, torch.float32)).contiguous()
        torch.distributed.all_reduce(wide)
        if wide is not values:
            values.copy_(wide)

    def gather(self, value: T) -> list[T]:
        import torch

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def share(self, work: Callable[[], T], say: Callable[[T], S]) -> tuple[T, list[S]]:
        error: BaseException | None = None
        result: Any = None
        said: Any = None
        try:
            result = work()
            said = say(result)
        except Exception as raised:
            error = raised
        outcomes = self.gather((_portable(error), said))
        errors = [raised for raised, _ in outcomes if raised is not None]
        self._failed = bool(errors)
        if errors:
            raise errors[0] from error
        return result, [said for _, said in outcomes]

    def leave(self) -> None:
        if self._failed:
            self.gather(None)

    def end(self) -> None:
        import torch

        torch.distributed.barrier()
        self._state.destroy_process_group()


def _portable(error: BaseException | None) -> Exception | None:
    """An error that can be pickled for another process."""
    if error is None:
        return None
    if isinstance(error, RequestError):
        return RequestError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    return error if isinstance(error, WorkError) else WorkError(f"{type(error).__name__}: {error}")


def local_count() -> int:
    """How many processes a launcher has started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_share(number: int) -> int:
    """This process's share, 1 at least, of what there are so many of for all processes of this machine."""
    return max(1, number // local_count())


def launched() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_processes() -> Processes:
    """Those of the launcher, if there is one."""
    return DistributedProcesses() if launched() > 1 else Processes()


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """Owner (0 … count − 1) of each item: neighbours stay together, sizes are divided about evenly."""
    total = sum(sizes) or 1
    owners, before = [], 0
    for size in sizes:
        owners.append(min(count - 1, (before + size // 2) * count // total))
        before += size
    return owners
