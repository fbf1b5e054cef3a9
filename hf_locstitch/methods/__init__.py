"""How values are combined: one file a method, found by its name. `--method task-arithmetic` is task_arithmetic.py.

A method is pure arithmetic on one chunk; reading, localizing, writing, resuming and publishing are the engine's.
A module defines METHOD, a Dense or a Masked. Adding one takes a file here, a test, and a line of documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from hf_locstitch.checkpoints.dtypes import Values
    from hf_locstitch.localize.selection import Kept
    from hf_locstitch.stitch import Coverage


class CombineDense(Protocol):
    def __call__(self, base: Values, finetuned: Sequence[Values], *, scale: float, dtype: np.dtype[Any]) -> Values:
        """base, finetuned: [n] of any floating dtype. Returns [n] in dtype."""
        ...


class CombineMasked(Protocol):
    def __call__(
        self,
        base: Values,
        kept: Sequence[Kept],
        covered: Coverage,
        *,
        scale: float,
        dtype: np.dtype[Any],
    ) -> Values:
        """base: [n]; kept: what each mask keeps of it; covered: by the masks. Returns [n]."""
        ...


@dataclass(frozen=True)
class Dense:
    """Combines whole tensors, all floating-point ones by default. paper: to cite.

    fitted: whether values fitted to data stand in for those of every model where that can be done (refit/regmean.py).
    """

    title: str
    paper: str
    combine: CombineDense
    fitted: bool = False


@dataclass(frozen=True)
class Masked:
    """Localizes each finetune first and combines what the masks keep.

    density: the default. blocks_only: ranges over the transformer blocks by default, else over all tensors.
    """

    title: str
    paper: str
    combine: CombineMasked
    density: float
    blocks_only: bool


def method_names() -> list[str]:
    return sorted(module.name.replace("_", "-") for module in iter_modules(__path__))


def find_method(name: str) -> Dense | Masked:
    """name: one of method_names()."""
    return import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
