"""Every exception that hf-locstitch raises on purpose.

LocstitchError
├── RequestError            what was asked for cannot be done; nothing was written (exit status 2)
│   ├── RecipeError         a recipe or a flag is wrong
│   ├── CheckpointError     a checkpoint is missing, closed to us, malformed, or of a kind that is not merged
│   ├── MismatchError       checkpoints that do not fit one another
│   ├── NonFiniteError      NaN or infinity in a tensor
│   ├── TaskError           an evaluation task that is unknown, or whose data set is closed to us
│   └── OutputError         the output folder or repo cannot be used
└── WorkError               the work failed; the same command may be given again (exit status 1)
    ├── DownloadError       bytes could not be fetched
    ├── IntegrityError      bytes are not those that were promised
    └── PublishError        the merge is done, the upload is not

Each message is one short paragraph: what is wrong, where, both values, the next step.
"""

from __future__ import annotations

from collections.abc import Sequence


class LocstitchError(Exception):
    """Base of all; `exit_status` is what the command line returns."""

    exit_status = 1


class RequestError(LocstitchError):
    exit_status = 2


class RecipeError(RequestError):
    pass


class CheckpointError(RequestError):
    pass


class MismatchError(RequestError):
    """Carries every `problem` that the headers show, so that one run tells all."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        head = (
            "the checkpoints do not fit together"
            if len(problems) == 1
            else f"the checkpoints do not fit together, {len(problems)} problems"
        )
        super().__init__(head + ":\n" + "\n".join(f"  - {problem}" for problem in problems))


class NonFiniteError(RequestError):
    pass


class TaskError(RequestError):
    pass


class OutputError(RequestError):
    pass


class WorkError(LocstitchError):
    pass


class DownloadError(WorkError):
    pass


class IntegrityError(WorkError):
    pass


class PublishError(WorkError):
    pass
