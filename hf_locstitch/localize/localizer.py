"""What a localizer is: its settings, as in a recipe, and how it finds masks.

To add your own, write one class in one file: see docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from hf_locstitch.localize.job import Cost, Group, LocalizeJob, Localizing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.artifacts.mask_source import MaskSource
    from hf_locstitch.runtime.dtypes import Values


class Localizer(BaseModel, ABC):
    """density: the share of the localizable elements that a mask keeps; None where the localizer decides.

    needs_data: whether it uses examples of each finetune's task. packages: modules beyond the core's that it imports,
    such as torch. joint: whether it finds one mask for all finetunes, from several passes over all of them.
    A subclass has a field `method: Literal[NAME]` and says which elements score highest: `scores` if a score follows
    from the element's two values (and its place), `find_masks` for anything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_data: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of each localizer, recorded in its own order
        method: Any = None
        density: Any = None

    @abstractmethod
    def groups(self, numels: Sequence[int]) -> list[Group]:
        """Which tensors (by index) compete with one another, and how many elements each group keeps."""

    @abstractmethod
    def describe(self) -> str:
        """For people: the settings, in one line."""

    def kept(self, numels: Sequence[int]) -> int:
        """Number of ones in a mask over tensors of these sizes (k)."""
        return sum(k for _, k in self.groups(numels))

    def scoring(self) -> dict[str, Any] | None:
        """The settings that decide what is scored, and how: merges that agree in them share one scan, and may differ in
        how many elements they keep. None if they cannot share it."""
        return self.model_dump(mode="json")

    def doubt(self, ones: int, n: int) -> str | None:
        """What is odd about a mask that keeps so many of n elements, and what to change, after "the mask of X"; None
        if nothing is."""
        return None

    def scores(self, tensor: str, first: int, finetuned: Values, base: Values) -> npt.NDArray[np.float32] | None:
        """How much each element matters: float32 [n], non-negative. None: |task vector|, the magnitude of its change.

        tensor: its name on disk. first: the flat index of the first element. finetuned, base: [n].
        """
        return None

    def cost(self, localizing: Localizing) -> Cost | None:
        """What it will cost beyond reading the models once."""
        return None

    def find_masks(self, job: LocalizeJob) -> Mapping[str, MaskSource]:
        """The mask of each finetune, by name: where its scores are largest. Raises RequestError or WorkError."""
        from hf_locstitch.localize.search import checked_scores, find_by_scores  # slow to import

        own = type(self).scores is not Localizer.scores
        return find_by_scores(job, checked_scores(self.method, self.scores) if own else None)
