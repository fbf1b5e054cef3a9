"""A PEFT adapter, which has no weights of a whole model: it is laid over its base (see the package adapters)."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import Checkpoint, Config, read_card, read_json, read_shard
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.kinds.pickle import UNSAFE_SUFFIXES
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some


class Adapter(CheckpointKind):
    rank: ClassVar[int] = 10

    def matches(self, files: Collection[str]) -> bool:
        return ADAPTER_CONFIG in files

    def read(self, source: Source, config: Config) -> Checkpoint:
        settings = read_json(source, ADAPTER_CONFIG)
        if ADAPTER_WEIGHTS not in source.files:
            raise CheckpointError(_no_weights(source))
        shard = read_shard(source, ADAPTER_WEIGHTS)
        return AdapterCheckpoint(source, (shard,), config, read_card(source), {}, settings)


def _no_weights(source: Source) -> str:
    unsafe = [file for file in source.files if file.startswith("adapter_model") and file.endswith(UNSAFE_SUFFIXES)]
    if not unsafe:
        return f"{source.label} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. Check the name, or fetch it again."
    return (
        f"{source.label} holds its adapter only in {some(unsafe)}; such files can run code when loaded and are never "
        "opened. Convert it first: PeftModel.from_pretrained(base, adapter).save_pretrained(folder)."
    )


COMPONENT = Adapter
