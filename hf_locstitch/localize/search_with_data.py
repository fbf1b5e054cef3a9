"""Masks of localizers that use data: scores first, then the same search as without data."""

from __future__ import annotations

from contextlib import ExitStack

from hf_locstitch.localize.activation_memory import find_load, settled
from hf_locstitch.localize.job import LocalizeJob
from hf_locstitch.localize.learn import Room
from hf_locstitch.localize.scan import Scan
from hf_locstitch.localize.score import score
from hf_locstitch.localize.score_file import ScoreFile
from hf_locstitch.localize.selection import Selection
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.kernels import Scores


def find_with_data(localizer: WithData, job: LocalizeJob) -> dict[str, Selection]:
    """The mask of each finetune, one after another. Raises RequestError or WorkError."""
    readers = job.inputs.fetch().readers
    selections: dict[str, Selection] = {}
    with ExitStack() as scans:  # if one fails, what the others selected is closed, too
        for name, data in job.data.items():
            load = find_load(localizer, data, job.finetuned[name], job.base, job.tensors)
            config = settled(localizer, load, job.processes.count)
            # The total is known only later.
            with job.progress.bar(f"{config.method} {name}", 0, " examples") as advance:
                room = Room(job.folder, job.processes, advance)
                scores = score(config, name, readers["base"], readers[name], job.tensors, data, room)
            job.note_examples(name, scores.examples)
            scan = Scan(
                job.base,
                {name: job.finetuned[name]},
                job.tensors,
                job.groups if scores.ones is None else [(list(range(len(job.tensors))), scores.ones)],
                job.folder,
                own=job.own,
                processes=job.processes,
                chunk=job.settings.chunk,
                workers=job.settings.workers,
                scores=_Stored(scores),
                shared=None if scores.ones is not None else job.shared,
            )
            selections |= scans.enter_context(scan).select(readers)
    return selections


class _Stored:
    """The scores in a file, in the form that a scan expects."""

    def __init__(self, file: ScoreFile) -> None:
        self._file = file

    def __call__(self, tensor: str, first: int, finetuned: Values, base: Values) -> Scores:
        return self._file.bits(tensor, first, len(base))
