"""The exceptions that hf-locstitch raises.

LocstitchError
├── RequestError            the request cannot be carried out; nothing was written (exit status 2)
│   ├── RecipeError         a recipe or a flag is wrong
│   ├── CheckpointError     a checkpoint is missing, not accessible, malformed, or of an unsupported kind
│   ├── MismatchError       checkpoints that do not fit together
│   ├── StrictError         what is only a warning without `strict`
│   ├── NonFiniteError      NaN or infinity in a tensor
│   ├── TaskError           an evaluation task that is unknown, or whose data set is not accessible
│   └── OutputError         the output folder or repo cannot be used
└── WorkError               the work failed; the same command can be run again (exit status 1)
    ├── DownloadError       a download failed
    ├── IntegrityError      a file does not match its hash or size
    └── PublishError        the merge succeeded, the upload failed

Each message is one short paragraph: what is wrong, where, both values, the next step.
"""

from __future__ import annotations

from collections.abc import Sequence


class LocstitchError(Exception):
    """Base class; `exit_status` is what the command line returns."""

    exit_status = 1


class RequestError(LocstitchError):
    exit_status = 2


class RecipeError(RequestError):
    pass


class CheckpointError(RequestError):
    pass


class MismatchError(RequestError):
    """Carries every problem found in the headers, so that one run reports them all."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        listed = [" ".join(problem.split()) for problem in problems]
        if len(listed) == 1:
            super().__init__(f"the checkpoints do not fit together: {listed[0].removesuffix('.')}.")
            return
        head = f"the checkpoints do not fit together, {len(listed)} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in listed)]))


class StrictError(RequestError):
    """Carries every warning."""

    def __init__(self, warnings: Sequence[str]) -> None:
        self.warnings = tuple(warnings)
        super().__init__(
            f"strict makes errors of warnings, and there {'is 1' if len(warnings) == 1 else f'are {len(warnings)}'}:\n"
            + "\n".join(f"  - {' '.join(warning.split())}" for warning in warnings)
            + "\nResolve them, or leave out --strict."
        )


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
