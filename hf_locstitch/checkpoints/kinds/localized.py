"""A localized checkpoint: a mask and the values under it, which needs its base to become a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError


class Localized(CheckpointKind):
    rank: ClassVar[int] = 20

    def matches(self, files: Collection[str]) -> bool:
        return "locstitch.json" in files and any(file.startswith("values/") for file in files)

    def read(self, source: Source, config: Config) -> Checkpoint:
        raise CheckpointError(
            f"{source.label} is a localized checkpoint, not a whole model. Stitch it into its base: "
            "hf-locstitch stitch --base REF --localized REF... --out DIR."
        )


COMPONENT = Localized
