"""GGUF files, which are quantized."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some


class Gguf(CheckpointKind):
    rank: ClassVar[int] = 40

    def matches(self, files: Collection[str]) -> bool:
        return any(file.endswith(".gguf") for file in files)

    def read(self, source: Source, config: Config) -> Checkpoint:
        files = [file for file in source.files if file.endswith(".gguf")]
        raise CheckpointError(
            f"{source.label} holds GGUF weights only ({some(files)}), which are quantized. "
            "Use the safetensors checkpoint they were made from."
        )


COMPONENT = Gguf
