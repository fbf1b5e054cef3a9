"""The files of the output: which tensor goes where, in which dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_locstitch.checkpoints.checkpoint import STEMS, Checkpoint, index_file, single_file
from hf_locstitch.checkpoints.header import TensorInfo, TensorSpec
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.runtime.dtypes import FLOATING, ITEM_BYTES, ON_DISK


@dataclass(frozen=True)
class PlannedTensor(TensorSpec):
    """One tensor of the output. localized: whether the method ranges over it."""

    localized: bool


@dataclass(frozen=True)
class OutputShard:
    file: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def output_shards(
    recipe: Recipe, base: Checkpoint, unmasked_from: Checkpoint, chosen: frozenset[str]
) -> tuple[OutputShard, ...]:
    """Names and order as in `unmasked_from`, unless a shard size is given; dtypes as `Recipe.dtype` says."""
    shards = [shard for shard in unmasked_from.shards if shard.header.tensors] or unmasked_from.shards[:1]
    planned = [[_planned(recipe, base, info, info.name in chosen) for info in shard.header.tensors] for shard in shards]
    metadata = dict(unmasked_from.shards[0].header.metadata) or {"format": "pt"}
    if recipe.shard_size is None:
        files = _standard_files(unmasked_from.source, [shard.file for shard in shards])
        return tuple(OutputShard(f, tuple(ts), metadata) for f, ts in zip(files, planned, strict=True))
    groups = _pack([tensor for tensors in planned for tensor in tensors], int(recipe.shard_size))
    stem = stem_of([shard.file for shard in shards])
    names = [shard_name(stem, i, len(groups)) for i in range(len(groups))]
    return tuple(OutputShard(name, tuple(group), metadata) for name, group in zip(names, groups, strict=True))


def _standard_files(source: Source, files: list[str]) -> list[str]:
    """The shards' own names where the model's library will find them in one folder, else standard ones."""
    stem = stem_of(files)
    single = single_file(stem)
    indexed = index_file(stem) in source.files and not any(file == single or "/" in file for file in files)
    standard = files == [single] or indexed
    return files if standard else [shard_name(stem, i, len(files)) for i in range(len(files))]


def stem_of(files: Sequence[str]) -> str:
    """What the names of a model's weight files begin with: diffusers' for those of diffusers, else transformers'."""
    return next((stem for stem in STEMS if all(file.startswith(stem) for file in files)), STEMS[0])


def shard_name(stem: str, i: int, count: int) -> str:
    """File name of shard i (from 0) of count."""
    return single_file(stem) if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"


def index_name(shards: Sequence[OutputShard]) -> str | None:
    """File name of their index; None of one that needs none."""
    files = [shard.file for shard in shards]
    stem = stem_of(files)
    return None if files == [single_file(stem)] else index_file(stem)


def _pack(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Cut the sequence wherever the next tensor would pass `limit` bytes; a larger tensor stands alone."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _planned(recipe: Recipe, base: Checkpoint, info: TensorInfo, localized: bool) -> PlannedTensor:
    known = base.info(info.name) if info.name in base.tensors else info
    source = known if localized else info
    dtype, nbytes = source.dtype, source.nbytes
    if dtype in FLOATING:
        asked = known.dtype if known.floating else dtype
        dtype = asked if recipe.dtype == "auto" else ON_DISK[recipe.dtype]
        nbytes = source.numel * ITEM_BYTES[dtype]
    return PlannedTensor(info.name, dtype, source.shape, nbytes, localized)


def guessed(info: TensorInfo, share: float) -> PlannedTensor:
    """A planned tensor with an estimated size: how many values a mask keeps is known only once it is found."""
    ones = round(share * info.numel)
    return PlannedTensor(info.name, info.dtype, (ones,), ones * ITEM_BYTES[info.dtype], localized=True)
