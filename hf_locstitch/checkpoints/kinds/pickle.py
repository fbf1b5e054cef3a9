"""Files that can run code when they are loaded: they are never opened."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


class Pickle(CheckpointKind):
    rank: ClassVar[int] = 50

    def matches(self, files: Collection[str]) -> bool:
        return any(file.endswith(UNSAFE_SUFFIXES) for file in files)

    def read(self, source: Source, config: Config) -> Checkpoint:
        files = [file for file in source.files if file.endswith(UNSAFE_SUFFIXES)]
        raise CheckpointError(
            f"{source.label} holds no safetensors, only {some(files)}; such files can run code when loaded and are "
            f"never opened. {_way_out(source)}"
        )


def _way_out(source: Source) -> str:
    if pulls := source.revisions_with_weights():
        return f"Its pull request {pulls[0].rpartition('/')[2]} has safetensors: use {source.repo}@{pulls[0]}."
    return (
        "Convert it first: load it with transformers and call save_pretrained(), or use the converter at "
        "https://huggingface.co/spaces/safetensors/convert."
    )


COMPONENT = Pickle
