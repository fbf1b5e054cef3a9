"""What a method is: how the values of a merge follow from those of the base and the finetuned models.

A method is pure arithmetic on one chunk; the engine does the reading, localizing, writing, resuming and publishing.
To add your own, write one class in one file: see docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np

    from hf_locstitch.artifacts.mask_source import MaskedValues
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.mean import Coverage


class Place(NamedTuple):
    """Where a chunk lies: the tensor's name on disk, and the flat index of its first element."""

    tensor: str
    first: int


class Method(BaseModel, ABC):
    """Its fields are its settings in a recipe: `method: {name: dare, seed: 1}`, or `method: average`.

    title, paper, citation: its name for people, the paper's URL, BibTeX. masked: whether it localizes each finetune
    first. needs_data: whether it uses unlabelled inputs. blocks_only: whether its default is to merge only the
    transformer blocks, not all tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: ClassVar[str]
    paper: ClassVar[str]
    citation: ClassVar[str] = ""
    masked: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    blocks_only: ClassVar[bool] = False

    if TYPE_CHECKING:  # a field of each method, a Literal
        name: Any = None

    def dump(self) -> str | dict[str, Any]:
        """Its entry in a recipe, without data: its name, and its settings if it has any."""
        own = self.model_dump(mode="json", exclude={"name", "data"})
        return {"name": self.name, **own} if own else self.name

    def describe(self) -> str:
        """For people: the title and the method's own settings."""
        own = self.model_dump(mode="json", exclude={"name", "data"})
        return self.title + (f" ({', '.join(f'{key} {value}' for key, value in own.items())})" if own else "")

    def introduce(self, models: int, fitted: str | None, joint: bool) -> str:
        """The first paragraph of a model card, Markdown. models: how many are merged. fitted: how their values were
        found, if they were fitted ("fitted to …"). joint: whether all have one mask."""
        plural = "model" if models == 1 else "models"
        return f"A merge of {models} finetuned {plural} by [{self.title}]({self.paper}), made with hf-locstitch."


class DenseMethod(Method):
    """Combines whole tensors."""

    @abstractmethod
    def combine(
        self, base: Values, finetuned: Sequence[Values], *, place: Place, scale: float, dtype: np.dtype[Any]
    ) -> Values:
        """base, finetuned: [n] of any floating dtype, in an order that does not depend on the order given. scale:
        the recipe's, a factor on the task vectors. Returns [n] in dtype."""


class MaskedMethod(Method):
    """Localizes each finetune first and combines what the masks keep. default_density: of the masks."""

    masked: ClassVar[bool] = True
    default_density: ClassVar[float] = 0.1

    @abstractmethod
    def combine(
        self,
        base: Values,
        kept: Sequence[MaskedValues],
        covered: Coverage,
        *,
        place: Place,
        scale: float,
        dtype: np.dtype[Any],
    ) -> Values:
        """base: [n]; kept: what each mask keeps; covered: how the masks cover it. Returns [n] in dtype."""
