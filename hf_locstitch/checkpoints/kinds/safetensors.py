"""A model as transformers saves it: model.safetensors, or shards and their index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from hf_locstitch.checkpoints.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Config,
    Shard,
    read_card,
    read_json,
    read_shard,
)
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.names import safe_shard, same_place
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some


class Safetensors(CheckpointKind):
    rank: ClassVar[int] = 0

    def matches(self, files: Collection[str]) -> bool:
        return SINGLE in files or INDEX in files

    def read(self, source: Source, config: Config) -> Checkpoint:
        """The index decides where there is no single file, as in transformers."""
        if SINGLE in source.files:
            return read_files(source, config, [SINGLE])
        weight_map = read_json(source, INDEX).get("weight_map")
        shards = _shard_names(f"{source.label}/{INDEX}", weight_map)
        if absent := [shard for shard in shards if shard not in source.files]:
            raise CheckpointError(f"{source.label} lacks {some(absent)}, which its {INDEX} lists. Fetch it again.")
        checkpoint = read_files(source, config, shards)
        if absent := [name for name in weight_map or () if name not in checkpoint.tensors]:
            raise CheckpointError(
                f"{source.label}: {INDEX} lists {len(absent)} tensors that no shard holds ({some(absent)}). "
                "Fetch it again."
            )
        return checkpoint


def _shard_names(where: str, weight_map: Any) -> list[str]:
    """The files that an index lists, sorted. Raises CheckpointError unless all may be shards, each in its own place."""
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where} has no weight_map from tensors to files. Fetch it again.")
    shards: list[str] = sorted(set(weight_map.values()))
    if not shards:
        raise CheckpointError(f"{where} lists no shards. Fetch it again.")
    try:
        for file in shards:
            safe_shard(file)
    except ValueError as error:
        raise CheckpointError(
            f"{where} lists a file that cannot be a shard: {error}. Shards are *.safetensors in the model's own "
            "folder. Save the model again with save_pretrained()."
        ) from error
    if twice := same_place(shards):
        raise CheckpointError(
            f"{where} lists {' and '.join(twice)}, which are one file where names have no case. "
            "Save the model again with save_pretrained()."
        )
    return shards


def read_files(source: Source, config: Config, files: Sequence[str]) -> Checkpoint:
    """The checkpoint that these safetensors files make up. Raises CheckpointError."""
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        shards = tuple(pool.map(lambda file: read_shard(source, file), files))
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    for shard in shards:
        for info in shard.header.tensors:
            if info.name in tensors:
                raise CheckpointError(
                    f"{source.label} holds {info.name} twice, in {tensors[info.name][0].file} and in {shard.file}. "
                    "Save the model again with save_pretrained()."
                )
            tensors[info.name] = (shard, info)
    return Checkpoint(source, shards, config, read_card(source), tensors)


COMPONENT = Safetensors
