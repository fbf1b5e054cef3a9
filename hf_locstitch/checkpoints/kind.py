"""What a kind of checkpoint is: how it is recognized by its files, and how its headers become a Checkpoint.

A kind of your own is one class in one file: see docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.source import Source


class CheckpointKind(ABC):
    """rank: if several kinds match a source, the lowest rank wins."""

    rank: ClassVar[int]

    @abstractmethod
    def matches(self, files: Collection[str]) -> bool:
        """Whether a source with these files is of this kind."""

    @abstractmethod
    def read(self, source: Source, config: Config) -> Checkpoint:
        """Read its headers, and nothing else. config: its config.json, empty if it has none.

        Raises CheckpointError, also if this kind cannot be merged: then with what its owner can do about it.
        """
