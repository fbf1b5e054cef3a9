"""Which tensors of the output each process works on, and which shards are written at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hf_locstitch.checkpoints.byte_ranges import Piece, Pieces, files_of
from hf_locstitch.plan.layout import OutputShard, PlannedTensor
from hf_locstitch.plan.plans import Plan
from hf_locstitch.runtime.processes import divide

Own = frozenset[str]  # names of tensors
InputFile = tuple[str, str]  # input, file


def divided(shards: Sequence[OutputShard], count: int) -> list[Own]:
    """Each shard by itself, so that all processes write one at a time. Returns the tensors of each process."""
    owned: list[set[str]] = [set() for _ in range(count)]
    for shard in shards:
        owners = divide([tensor.nbytes for tensor in shard.tensors], count)
        for tensor, owner in zip(shard.tensors, owners, strict=True):
            owned[owner].add(tensor.name)
    return [frozenset(names) for names in owned]


def divided_by_file(plan: Plan, count: int) -> list[Own]:
    """So that no two processes read the same file of a repo: each file comes whole, to one process that can check it.

    Tensors that are read from one file, or through others from files in common, go to one process. So where files of
    the inputs do not begin and end with the same tensors, all may go to one.
    """
    if count == 1:
        return divided(plan.shards, count)
    groups = _reading_apart(plan)
    owners = divide([sum(tensor.nbytes for tensor in group) for group in groups], count)
    return [
        frozenset(tensor.name for group, owner in zip(groups, owners, strict=True) if owner == rank for tensor in group)
        for rank in range(count)
    ]


def part_of(shards: Sequence[OutputShard], own: Collection[str]) -> list[OutputShard]:
    """Of each shard the tensors in `own`."""
    return [replace(shard, tensors=tuple(tensor for tensor in shard.tensors if tensor.name in own)) for shard in shards]


def rounds(shards: Sequence[OutputShard], owned: Sequence[Own]) -> list[list[OutputShard]]:
    """All shards, in groups that are written one after another: in each, every process has something to write, as long
    as there is any left for it. owned: the tensors of each process."""
    left = [[shard for shard in shards if any(tensor.name in own for tensor in shard.tensors)] for own in owned]
    left.append([shard for shard in shards if not shard.tensors])
    found: list[list[OutputShard]] = []
    while any(left):
        files = {of_one[0].file for of_one in left if of_one}
        found.append([shard for shard in shards if shard.file in files])
        left = [[shard for shard in of_one if shard.file not in files] for of_one in left]
    return found


def own_pieces(pieces: Pieces, own: Collection[str]) -> dict[str, Sequence[Piece]]:
    """Those of the tensors in `own`; every input is named."""
    return {name: [piece for piece in listed if piece[0] in own] for name, listed in pieces.items()}


def _reading_apart(plan: Plan) -> list[list[PlannedTensor]]:
    """The output's tensors, in groups of which no two read the same file of a repo."""
    scanned: dict[str, set[InputFile]] = {}
    for name, pieces in plan.scanned.items():
        for piece in pieces:
            scanned.setdefault(piece[0], set()).update(_hub_files(plan, {name: [piece]}))
    groups: list[tuple[set[InputFile], list[PlannedTensor]]] = []
    local: list[list[PlannedTensor]] = []
    for shard in plan.shards:
        for tensor in shard.tensors:
            files = _hub_files(plan, plan.written_from([replace(shard, tensors=(tensor,))]))
            files |= scanned.get(tensor.name, set())
            touching = [group for group in groups if not group[0].isdisjoint(files)]
            if not files:
                local.append([tensor])
            elif len(touching) == 1:
                touching[0][0].update(files)
                touching[0][1].append(tensor)
            else:
                groups = [group for group in groups if group not in touching]
                before = [one for _, tensors in touching for one in tensors]
                groups.append((files.union(*(known for known, _ in touching)), [*before, tensor]))
    return [*(tensors for _, tensors in groups), *local]


def _hub_files(plan: Plan, pieces: Pieces) -> set[InputFile]:
    return {
        (name, file)
        for name, listed in pieces.items()
        if not plan.inputs[name].source.local
        for file in files_of(plan.inputs[name], [tensor for tensor, _, _ in listed])
    }
