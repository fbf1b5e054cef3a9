"""What a localizer is: its settings as a recipe names them, and how it finds masks.

A localizer of your own is one class in one file: see docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.artifacts.mask_source import MaskSource
    from hf_locstitch.checkpoints.byte_ranges import Pieces
    from hf_locstitch.checkpoints.checkpoint import Checkpoint
    from hf_locstitch.checkpoints.header import TensorInfo
    from hf_locstitch.checkpoints.reader import CheckpointReader
    from hf_locstitch.runtime.dtypes import Values
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
    masks. trusted: whether what an earlier process took of (model, tensor) was right.
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


class Localizer(BaseModel, ABC):
    """density: the share of the localizable elements that a mask keeps; None where the localizer decides.

    needs_data: whether it looks at examples of each finetune's task. A subclass has a field `method: Literal["its name"]`
    and says which elements score highest: `scores` if a score follows from the element's two values (and its place),
    `find_masks` for anything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_data: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of each localizer, in its own order: they are recorded as they come
        method: Any = None
        density: Any = None

    @abstractmethod
    def groups(self, numels: Sequence[int]) -> list[Group]:
        """Which tensors (by number) compete with one another, and how many elements each group keeps."""

    @abstractmethod
    def describe(self) -> str:
        """For a person: the settings, in one line."""

    def kept(self, numels: Sequence[int]) -> int:
        """Number of ones in a mask over tensors of these sizes (k)."""
        return sum(k for _, k in self.groups(numels))

    def scores(self, tensor: str, first: int, finetuned: Values, base: Values) -> npt.NDArray[np.float32] | None:
        """How much each element matters: float32 [n], not negative. None: the size of the task vector, |finetuned − base|.

        tensor: its name on disk. first: the place of the first element in it. finetuned, base: [n].
        """
        return None

    def cost(self, localizing: Localizing) -> Cost | None:
        """What it will take beyond reading the models once."""
        return None

    def find_masks(self, job: LocalizeJob) -> Mapping[str, MaskSource]:
        """The mask of each finetune, by name: where its scores are largest. Raises RequestError or WorkError."""
        from hf_locstitch.localize.search import find_by_scores  # needs what is slow to import

        return find_by_scores(self, job)
