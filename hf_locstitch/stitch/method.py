"""What a method is: how the values of a merge follow from those of the base and the finetuned models.

A method is pure arithmetic on one chunk or one tensor; the engine does the reading, localizing, writing, resuming and
publishing.
To add your own, write one class in one file: see docs/extending.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Context:
    """What a method is told of the chunk or tensor that it merges, beside its values.

    weights: of each finetune, in this tensor; all 1 for methods that take none. place: where a chunk lies; a whole
    tensor begins at 0. scale: the recipe's, a factor on the task vectors. dtype: of the output.
    """

    weights: Sequence[float]
    place: Place
    scale: float
    dtype: np.dtype[Any]

    @property
    def tensor(self) -> str:
        """Its name on disk."""
        return self.place.tensor


class Method(BaseModel, ABC):
    """Its fields are its settings in a recipe: `method: {name: dare, seed: 1}`, or `method: average`.

    title, paper, citation: its name for people, the paper's URL, BibTeX. masked: whether it localizes each finetune
    first. needs_data: whether it uses unlabelled inputs. packages: modules beyond the core's
    that it imports, such as torch. blocks_only: whether its default is to merge only the
    transformer blocks, not all tensors. least, most: how many finetunes it takes. ordered: whether it tells them apart
    by the order given; else they come in one that does not depend on it. weighted: whether finetunes may have weights.
    by_globs: the settings that may be numbers by globs of tensors. of_finetunes: those that have, if they are given, an
    entry for each finetune, which may be by globs, too. of_models: whether it combines the models themselves, not their
    task vectors, so that the base may be one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: ClassVar[str]
    paper: ClassVar[str]
    citation: ClassVar[str] = ""
    masked: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    blocks_only: ClassVar[bool] = False
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    ordered: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    by_globs: ClassVar[tuple[str, ...]] = ()
    of_finetunes: ClassVar[tuple[str, ...]] = ()
    of_models: ClassVar[bool] = False

    if TYPE_CHECKING:  # a field of each method, a Literal
        name: Any = None

    def misfit(self, models: int) -> str | None:
        """What is wrong with merging so many finetunes, as a clause; None if nothing is."""
        if models < self.least or (self.most is not None and models > self.most):
            needed = f"{self.least}" if self.least == self.most else f"at least {self.least}"
            return f"{self.name} merges {needed} finetunes, not {models}"
        for field in self.of_finetunes:
            if (count := len(getattr(self, field))) not in (0, models):
                return f"{field} needs one for each finetune: expected {models}, got {count}"
        return None

    def in_order(self, order: Sequence[int]) -> Method:
        """The same for the finetunes in another order, given by their numbers."""
        given = {field: getattr(self, field) for field in self.of_finetunes if getattr(self, field)}
        return self.model_copy(update={field: tuple(one[i] for i in order) for field, one in given.items()})

    @property
    def normalized(self) -> bool:
        """Whether it divides by the sum of all weights, which must not be 0 then."""
        return bool(getattr(self, "normalize", False))

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
    """Combines whole models, element by element."""

    @abstractmethod
    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base, finetuned: [n] of any floating dtype. Returns [n] in the context's dtype."""


class TensorMethod(Method):
    """Combines whole models, a tensor at a time: for what takes its norm, its rows, or the matrix that it is.

    A tensor is in memory as a whole, and one is computed by one thread. copies: in float64, of a tensor, that it holds
    at once, base and result among them; of_each: and for each finetune. linear_algebra: whether it uses torch's, which
    is kept to one thread.
    """

    copies: ClassVar[float] = 3.5
    of_each: ClassVar[float] = 1
    linear_algebra: ClassVar[bool] = False

    @abstractmethod
    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base, finetuned: [*shape] of any floating dtype, a scalar as [1]. Returns [*shape] in the context's dtype."""

    def memory(self, shape: Sequence[int], models: int) -> int:
        """Bytes that merging a tensor of so many finetunes takes at most."""
        return math.ceil(8 * math.prod(shape) * (self.copies + self.of_each * models))


class MaskedMethod(Method):
    """Localizes each finetune first and combines what the masks keep. default_density: of the masks."""

    masked: ClassVar[bool] = True
    default_density: ClassVar[float] = 0.1

    @abstractmethod
    def combine(self, base: Values, kept: Sequence[MaskedValues], covered: Coverage, context: Context) -> Values:
        """base: [n]; kept: what each mask keeps; covered: how the masks cover it. Returns [n] in the context's
        dtype."""
