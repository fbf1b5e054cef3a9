"""A model as transformers saves it: model.safetensors, or shards and their index."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from hf_locstitch.checkpoints.checkpoint import (
    STEMS,
    Checkpoint,
    Config,
    Shard,
    index_file,
    read_card,
    read_json,
    read_shard,
    single_file,
)
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.checkpoints.names import safe_shard, same_place
from hf_locstitch.checkpoints.ref import WEIGHTS
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import counted, some

VARIANT = re.compile(rf"({'|'.join(STEMS)})(\.\w+\.safetensors|\.safetensors\.index\.\w+\.json)")


class Safetensors(CheckpointKind):
    rank: ClassVar[int] = 0

    def matches(self, files: Collection[str]) -> bool:
        return _main_file(files) is not None

    def read(self, source: Source, config: Config) -> Checkpoint:
        """The index decides where there is no single file, as in transformers."""
        main = _main_file(source.files)
        assert main is not None
        if main.endswith(WEIGHTS):
            return read_files(source, config, [main])
        weight_map = read_json(source, main).get("weight_map")
        shards = _shard_names(f"{source.label}/{main}", weight_map)
        if absent := [shard for shard in shards if shard not in source.files]:
            raise CheckpointError(f"{source.label} lacks {some(absent)}, which its {main} lists. Fetch it again.")
        checkpoint = read_files(source, config, shards)
        if absent := [name for name in weight_map or () if name not in checkpoint.tensors]:
            raise CheckpointError(
                f"{source.label}: {main} lists {counted(len(absent), 'tensor')} that no shard holds ({some(absent)}). "
                "Fetch it again."
            )
        return checkpoint


def _main_file(files: Collection[str]) -> str | None:
    """The single file or the index, of a variant such as fp16 only if there is but one and nothing else."""
    for stem in STEMS:
        for file in (single_file(stem), index_file(stem)):
            if file in files:
                return file
    variants = [file for file in files if VARIANT.fullmatch(file)]
    return variants[0] if len(variants) == 1 else None


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
