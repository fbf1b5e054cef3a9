"""What a localizer is given: by plans before the work starts, and by the engine when it does."""

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
    from hf_locstitch.localize.shared_scan import SharedScan
    from hf_locstitch.runtime.processes import Processes
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.runtime.settings import Settings
    from hf_locstitch.tasks.sets import OpenSet

Group = tuple[Sequence[int], int]  # indices of tensors that compete with one another, and how many elements they keep


class Localizing(Protocol):
    """What a localizer knows before the work starts, from the plan: headers and configs only."""

    @property
    def base(self) -> Checkpoint: ...

    @property
    def finetuned(self) -> Mapping[str, Checkpoint]: ...

    @property
    def mask_tensors(self) -> Sequence[TensorInfo]: ...

    @property
    def data(self) -> Mapping[str, OpenSet]: ...


class Cost(Protocol):
    """What a component will cost."""

    def describe(self) -> str:
        """For people, one line."""
        ...

    def as_json(self) -> dict[str, Any]: ...


class OpenedInputs(Protocol):
    @property
    def readers(self) -> Mapping[str, CheckpointReader]: ...

    def verify(self) -> None:
        """Wait until everything that was read is verified. Raises IntegrityError."""
        ...


class InputFiles(Protocol):
    """The inputs of a merge, wherever their files are."""

    @property
    def all_here(self) -> bool:
        """Whether all files needed are on this machine by now."""
        ...

    def fetch(self) -> OpenedInputs:
        """Download all files completely, for any number of passes."""
        ...

    def opened(self, pieces: Pieces, kept: Pieces | None = None) -> AbstractContextManager[OpenedInputs]:
        """Open for one pass over `pieces`. kept: what a later pass will read."""
        ...


@dataclass(frozen=True)
class LocalizeJob:
    """All that is needed to find masks. Every process makes the same calls.

    order: of the finetunes in sums. tensors: the localizable ones, as in the base; groups: which of them compete.
    own: the names of those that this process handles. folder: for temporary files. kept: what of the finetuned
    models is read later, beside the masks. trusted: whether what an earlier process kept of (model, tensor) can be
    used. note_examples: called with the number of examples that a finetune's mask was found with. shared: where
    scores stay for other merges; `folder` is then its folder.
    """

    base: Checkpoint
    finetuned: Mapping[str, Checkpoint]
    order: Sequence[str]
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
    shared: SharedScan | None = None
