"""What localizing is told and given: by plans before it begins, and by the engine when it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.byte_ranges import Pieces
    from hf_locstitch.checkpoints.checkpoint import Checkpoint
    from hf_locstitch.checkpoints.header import TensorInfo
    from hf_locstitch.checkpoints.reader import CheckpointReader
    from hf_locstitch.runtime.processes import Processes
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.runtime.settings import Settings
    from hf_locstitch.tasks.sets import OpenSet

Group = tuple[Sequence[int], int]  # tensors, by number, that compete with one another, and how many elements they keep


class Localizing(Protocol):
    """What localizing is told of before it begins, as plans have it: of headers and configs alone."""

    @property
    def base(self) -> Checkpoint: ...

    @property
    def finetuned(self) -> Mapping[str, Checkpoint]: ...

    @property
    def mask_tensors(self) -> Sequence[TensorInfo]: ...

    @property
    def data(self) -> Mapping[str, OpenSet]: ...


class Cost(Protocol):
    """What a component will take."""

    def describe(self) -> str:
        """For a person, one line."""
        ...

    def as_json(self) -> dict[str, Any]: ...


class OpenedInputs(Protocol):
    @property
    def readers(self) -> Mapping[str, CheckpointReader]: ...

    def verify(self) -> None:
        """Wait until all that was read proved right. Raises IntegrityError."""
        ...


class InputFiles(Protocol):
    """The inputs of a merge, wherever their files are."""

    @property
    def all_here(self) -> bool:
        """Whether every file that is read is on this machine by now."""
        ...

    def fetch(self) -> OpenedInputs:
        """All of them whole, on this machine, for any number of passes."""
        ...

    def opened(self, pieces: Pieces, kept: Pieces | None = None) -> AbstractContextManager[OpenedInputs]:
        """For one pass over `pieces`. kept: what a later pass will read."""
        ...


@dataclass(frozen=True)
class LocalizeJob:
    """All that finding masks needs. Every process makes the same calls.

    tensors: the localizable ones, as the base holds them; groups: which of them compete. own: the names of those that
    this process looks at. folder: for temporary files. kept: what of the finetuned models is read later, beside the
    masks. trusted: whether what an earlier process took of (model, tensor) was right. note_examples: is told how many
    examples a finetune's mask was found with.
    """

    base: Checkpoint
    finetuned: Mapping[str, Checkpoint]
    tensors: Sequence[TensorInfo]
    groups: Sequence[Group]
    data: Mapping[str, OpenSet]
    inputs: InputFiles
    own: Collection[str]
    folder: Path
    settings: Settings
    processes: Processes
    progress: Progress
    kept: Pieces
    trusted: Callable[[str, str], bool]
    allow_non_finite: bool
    note_examples: Callable[[str, int], object] = lambda name, count: None
