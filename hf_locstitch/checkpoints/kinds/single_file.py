"""One safetensors file of any name; with several, it is unknown which of them make up the model."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.kinds.safetensors import read_files
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some

PART = re.compile(r"-\d+-of-(?P<count>\d+)\.safetensors$")  # how the names of a model's several files end


class SingleFile(CheckpointKind):
    rank: ClassVar[int] = 30

    def matches(self, files: Collection[str]) -> bool:
        return bool(_loose(files))

    def read(self, source: Source, config: Config) -> Checkpoint:
        files = _loose(source.files)
        if len(files) > 1:
            raise CheckpointError(
                f"{source.label} has {len(files)} safetensors files ({some(files)}) but neither {SINGLE} nor {INDEX}, "
                "so which of them make up the model is unknown. Save the model again with save_pretrained()."
            )
        if (part := PART.search(files[0])) and int(part["count"]) > 1:
            raise CheckpointError(
                f"{source.label} has {files[0]} alone, one of the {int(part['count'])} files of a model: the others "
                f"and {INDEX} are missing. Fetch all of them, and name their folder."
            )
        return read_files(source, config, files)


def _loose(files: Collection[str]) -> list[str]:
    return [file for file in files if file.endswith(".safetensors") and "/" not in file]


COMPONENT = SingleFile
