"""Mistral's own format: consolidated.safetensors, whose tensors transformers knows by other names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError

CONSOLIDATED = re.compile(r"consolidated[\w.-]*\.safetensors")


class MistralNative(CheckpointKind):
    rank: ClassVar[int] = 25

    def matches(self, files: Collection[str]) -> bool:
        return any(CONSOLIDATED.fullmatch(file) for file in files)

    def read(self, source: Source, config: Config) -> Checkpoint:
        file = next(file for file in source.files if CONSOLIDATED.fullmatch(file))
        raise CheckpointError(
            f"{source.label} holds {file} only, in Mistral's own format: transformers loads other names and files. "
            "Use the same model in transformers' format (model.safetensors, or shards and their index); "
            "convert_mistral_weights_to_hf.py in the transformers repo makes it."
        )


COMPONENT = MistralNative
