"""Which batches of inputs a process takes through both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_locstitch.runtime.processes import Processes, divide
from hf_locstitch.stitch.refit.lockstep import Pair
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.states import MakeStates
from hf_locstitch.stitch.refit.stops import Key

Job = tuple[int, int]  # a task and one of its batches, by index


def make_pairs(
    jobs: Sequence[Job],
    models: Sequence[TaskModels],
    stops: Sequence[frozenset[str]],
    sums: frozenset[Key],
    processes: Processes,
    states: MakeStates,
) -> list[Pair]:
    """This process's share of the jobs, in order; may be empty. stops: of each task's model. sums, states: see Pass."""
    own = own_jobs(jobs, models, processes)
    return [_make_pair(job, models[job[0]], stops[job[0]], sums, states) for job in own]


def own_jobs(jobs: Sequence[Job], models: Sequence[TaskModels], processes: Processes) -> list[Job]:
    """Fitted batches cost more than held-out ones, so each kind is divided separately. Neighbours stay together: the
    fewer tasks a process has, the less it reads.
    """
    own: list[Job] = []
    for fitted in (True, False):
        kind = [(task, number) for task, number in jobs if (number < models[task].fitted) == fitted]
        owners = divide([len(models[task].batches[number]) for task, number in kind], processes.count)
        own += [job for job, owner in zip(kind, owners, strict=True) if owner == processes.rank]
    return sorted(own)


def _make_pair(
    job: Job, task_models: TaskModels, stops: frozenset[str], sums: frozenset[Key], states: MakeStates
) -> Pair:
    task, number = job
    batch = task_models.batches[number]
    work = _work(task_models, batch)
    merged, finetuned = (
        Pass(weights, work, stops, sums, states()) for weights in (task_models.merged, task_models.finetuned)
    )
    return Pair(task, number < task_models.fitted, merged, finetuned, examples=batch, number=number)


def _work(task_models: TaskModels, batch: Sequence[Any]) -> Callable[[], Tensor]:
    return lambda: task_models.task.outputs(task_models.model, batch)
