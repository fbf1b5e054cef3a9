"""A kind of checkpoint: weights in a folder `model/` of the repo."""

from typing import ClassVar

from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.kinds.safetensors import read_files

FILE = "model/model.safetensors"


class Subfolder(CheckpointKind):
    rank: ClassVar[int] = 15  # after models and adapters, before localized checkpoints

    def matches(self, files):
        return FILE in files

    def read(self, source, config):
        return read_files(source, config, [FILE])
