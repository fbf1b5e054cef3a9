"""A PEFT adapter, which has no weights of a whole model."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError


class Adapter(CheckpointKind):
    rank: ClassVar[int] = 10

    def matches(self, files: Collection[str]) -> bool:
        return "adapter_config.json" in files

    def read(self, source: Source, config: Config) -> Checkpoint:
        raise CheckpointError(
            f"{source.label} is a PEFT adapter without its base's weights. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), then use that folder."
        )


COMPONENT = Adapter
