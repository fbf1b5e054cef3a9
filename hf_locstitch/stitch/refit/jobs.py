"""Which batches of inputs a process takes through both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_locstitch.runtime.processes import Processes, divide
from hf_locstitch.stitch.refit.lockstep import Pair
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.passes import Key, Pass
from hf_locstitch.stitch.refit.states import MakeStates

Job = tuple[int, int]  # a task, and one of its batches, by their numbers


def make_pairs(
    jobs: Sequence[Job],
    subjects: Sequence[TaskModels],
    stops: Sequence[frozenset[str]],
    sums: frozenset[Key],
    processes: Processes,
    states: MakeStates,
) -> list[Pair]:
    """This process's share of the jobs, in order; perhaps none. stops: of each task's model. sums, states: see Pass."""
    own = own_jobs(jobs, subjects, processes)
    return [_make_pair(job, subjects[job[0]], stops[job[0]], sums, states) for job in own]


def own_jobs(jobs: Sequence[Job], subjects: Sequence[TaskModels], processes: Processes) -> list[Job]:
    """Fitted batches cost more than held-out ones, so each kind is shared out by itself. Neighbours stay together: the
    fewer tasks a process has, the less it reads.
    """
    own: list[Job] = []
    for fitted in (True, False):
        kind = [(task, number) for task, number in jobs if (number < subjects[task].fitted) == fitted]
        owners = divide([len(subjects[task].batches[number]) for task, number in kind], processes.count)
        own += [job for job, owner in zip(kind, owners, strict=True) if owner == processes.rank]
    return sorted(own)


def _make_pair(job: Job, subject: TaskModels, stops: frozenset[str], sums: frozenset[Key], states: MakeStates) -> Pair:
    task, number = job
    batch = subject.batches[number]
    work = _work(subject, batch)
    merged, finetuned = (Pass(weights, work, stops, sums, states()) for weights in (subject.merged, subject.finetuned))
    return Pair(task, number < subject.fitted, merged, finetuned, examples=batch, number=number)


def _work(subject: TaskModels, batch: Sequence[Any]) -> Callable[[], Tensor]:
    return lambda: subject.task.outputs(subject.model, batch)
