"""One scan for merges that differ in the density of their masks, or in what becomes of them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_locstitch.runtime.files import write_atomically


@dataclass(frozen=True)
class SharedScan:
    """Where the scores of a localizer stay, for all merges that find masks by them. The first scans, the others read.

    folder: for the scores, which must be the same for all. most: of the merge whose masks keep most, which tensors (by
    number) compete, and how many elements each such group keeps.
    """

    folder: Path
    most: Sequence[tuple[Sequence[int], int]]

    @property
    def verified(self) -> bool:
        """Whether everything that was scanned has been verified since."""
        return self._mark.exists()

    def note_verified(self) -> None:
        write_atomically(self._mark, "")

    @property
    def _mark(self) -> Path:
        return self.folder / "verified"
