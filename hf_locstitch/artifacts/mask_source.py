"""A mask with its finetuned values, read chunk by chunk: of a selection just made, or of one that was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.runtime.dtypes import Values

if TYPE_CHECKING:
    from hf_locstitch.runtime.kernels import Positions


@dataclass(frozen=True)
class MaskedValues:
    """What one mask keeps of one chunk.

    positions: [m], ascending, from the chunk's start; values: [m] in the finetuned dtype.
    """

    positions: Positions
    values: Values


class MaskSource(Protocol):
    """A settled mask with its finetuned values, read chunk by chunk. chunks: of the localized tensors `names`."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def chunks(self) -> Sequence[Chunk]: ...

    @property
    def ones(self) -> int: ...

    def kept(self, chunk: Chunk) -> MaskedValues: ...

    def close(self) -> None: ...
