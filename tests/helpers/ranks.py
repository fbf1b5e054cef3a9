"""Several processes of one merge, played by threads: what they say to each other goes through memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.engine.execute import make
from hf_locstitch.engine.model_run import ModelRun
from hf_locstitch.engine.run import Run
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.processes import Counts, DistributedProcesses, Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings

T = TypeVar("T")


class Rank(DistributedProcesses):
    """One of them. meeting, values: common to all."""

    def __init__(self, rank: int, count: int, meeting: threading.Barrier, values: list[Any]) -> None:
        Processes.__init__(self, rank, count)
        self._meeting, self._values, self._failed = meeting, values, False

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._meeting.wait()
        found = list(self._values)
        self._meeting.wait()
        return found

    def sum(self, counts: Counts) -> Counts:
        return sum(self.gather(counts))

    def end(self) -> None:
        self.gather(None)


def in_ranks(count: int, work: Callable[[Processes], T]) -> list[T | BaseException]:
    """What `work` returns or raises in each of so many, in order."""
    # Before Python 3.12 a cached property is computed under a lock of its class: threads would wait for one another.
    for shared in (vars(Run)["files"], vars(ModelRun)["_finished"]):
        shared.lock = nullcontext()
    meeting, values = threading.Barrier(count, timeout=60), [None] * count

    def run(rank: int) -> T | BaseException:
        try:
            return work(Rank(rank, count, meeting, values))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def merge_in_ranks(count: int, out: Path, fields: dict[str, Any]) -> None:
    """Merge, each of so many with a plan and readers of its own. fields: of the recipe."""

    def work(ranks: Processes) -> Manifest:
        return make(make_plan(make_recipe({**fields, "figures": False}), Settings()), out, Progress(False), ranks)

    for record in in_ranks(count, work):
        assert isinstance(record, Manifest), record
