"""What a localized checkpoint or a merge changes in its base, tensor by tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, read_localized
from hf_locstitch.artifacts.manifest import RECIPE_FILE, Manifest, check_names, open_manifest
from hf_locstitch.artifacts.mask_file import MaskFile, Positions
from hf_locstitch.checkpoints.checkpoint import Checkpoint, open_source, read_card
from hf_locstitch.checkpoints.opening import read_checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, IntegrityError, MismatchError
from hf_locstitch.exports.expressible import check_masked, misfits, unlike
from hf_locstitch.inspection.verification.inputs import InputRef, check_hashes, fetch_tensors, open_inputs
from hf_locstitch.plan.recipe_file import recipe_of
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 24  # bytes compared at once


class Mask(Protocol):
    """A MaskFile or a LocalizedCheckpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def positions(self, tensor: str) -> Positions: ...


class Changes(ABC):
    """source, record: of the localized checkpoint or merge. base: its base; masks: together they cover all changes.

    Raises MismatchError if they do not fit together.
    """

    kind: str

    def __init__(self, source: Source, record: Manifest, base: Checkpoint, masks: Sequence[Mask]) -> None:
        self.source, self.record, self.base = source, record, base
        self._masks = masks
        if problems := [*self._misfits()]:
            raise MismatchError(problems)

    @property
    def label(self) -> str:
        return self.source.label

    @cached_property
    def card(self) -> Mapping[str, Any]:
        return read_card(self.source)

    @cached_property
    @abstractmethod
    def ones(self) -> Mapping[str, int]:
        """Of each tensor that is changed, how many elements the masks cover."""

    def positions(self, tensor: str) -> Positions:
        """What the masks cover. Returns int64 [ones], ascending. Raises IntegrityError."""
        found = [mask.positions(tensor) for mask in self._masks if tensor in mask.shapes]
        return found[0] if len(found) == 1 else np.unique(np.concatenate(found))

    def read(self, tensor: str) -> tuple[Tensor, Tensor]:
        """The base's values and the changed ones, [n] each, in the base's dtype. Raises IntegrityError."""
        before = self._base.flat(tensor, 0, self.base.info(tensor).numel)
        return before, self._changed(tensor, before) if tensor in self.ones else before

    @abstractmethod
    def check_rest(self, progress: Progress) -> None:
        """Whether all else is the base's, to the bit. Raises IntegrityError."""

    @abstractmethod
    def _changed(self, tensor: str, before: Tensor) -> Tensor: ...

    @cached_property
    def _base(self) -> CheckpointReader:
        return fetch_tensors(self.base, self.base.tensors)

    def _misfits(self) -> Iterator[str]:
        yield from misfits(self.label, self.base, [shape for mask in self._masks for shape in mask.shapes.items()])


class LocalizedChanges(Changes):
    kind = "localized checkpoint"

    def __init__(self, localized: LocalizedCheckpoint, base: Checkpoint) -> None:
        self._localized = localized
        super().__init__(localized.source, localized.record, base, [localized])

    @cached_property
    def ones(self) -> Mapping[str, int]:
        counts = {name: self._localized.stored(name).numel for name in self._localized.shapes}
        return {name: count for name, count in counts.items() if count}

    def check_rest(self, progress: Progress) -> None:
        """It holds nothing else."""

    def _changed(self, tensor: str, before: Tensor) -> Tensor:
        import torch

        at, values = self.positions(tensor), self._localized.values(tensor)
        if len(at) != len(values):
            raise IntegrityError(
                f"{self.label} has {counted(len(values), 'value')} for {tensor}, but its mask has {len(at):,} ones "
                "there. Fetch it again."
            )
        after = before.clone()
        after[torch.from_numpy(at)] = values.to(before.dtype)
        return after


class MergeChanges(Changes):
    kind = "merge"

    def __init__(self, merged: Checkpoint, record: Manifest, base: Checkpoint, masks: Sequence[MaskFile]) -> None:
        self._merged = merged
        super().__init__(merged.source, record, base, masks)

    @cached_property
    def ones(self) -> Mapping[str, int]:
        names = dict.fromkeys(name for mask in self._masks for name in mask.shapes)
        counts = {name: len(self.positions(name)) for name in names}
        return {name: count for name, count in counts.items() if count}

    def check_rest(self, progress: Progress) -> None:
        rest = [info for _, info in self.base.tensors.values() if info.name not in self.ones]
        with progress.bar("comparing", sum(info.nbytes for info in rest)) as advance:
            for info in rest:
                for first in range(0, info.nbytes, PIECE):
                    stop = min(first + PIECE, info.nbytes)
                    own, due = (reader.raw(info.name, first, stop) for reader in (self._values, self._base))
                    if not np.array_equal(np.frombuffer(own, np.uint8), np.frombuffer(due, np.uint8)):
                        raise IntegrityError(
                            f"{info.name} in {self.label} is not the base's, though no mask covers any of it, so an "
                            f"adapter would leave that change out. Run hf-locstitch verify {self.label} --tensors all."
                        )
                    advance(stop - first)
                for reader in (self._values, self._base):
                    reader.release(info.name, 0, info.numel)

    def _changed(self, tensor: str, before: Tensor) -> Tensor:
        import torch

        after = self._values.flat(tensor, 0, len(before))
        rest = before.clone()
        at = torch.from_numpy(self.positions(tensor))
        rest[at] = after[at]
        if not torch.equal(_bits(rest), _bits(after)):
            count = int((_bits(rest) != _bits(after)).any(-1).sum())
            raise IntegrityError(
                f"{tensor} differs from the base in {counted(count, 'element')} outside the masks of {self.label}, so "
                f"its files are not those of one merge. Run hf-locstitch verify {self.label} --tensors all."
            )
        return after

    @cached_property
    def _values(self) -> CheckpointReader:
        return fetch_tensors(self._merged, self._merged.tensors)

    def _misfits(self) -> Iterator[str]:
        yield from super()._misfits()
        infos = [info for _, info in self._merged.tensors.values()]
        yield from unlike(self.label, self.base, {info.name: (info.dtype, info.shape) for info in infos})


def _bits(values: Tensor) -> Tensor:
    """[n, bytes]: NaN equals itself."""
    import torch

    return values.view(torch.uint8).view(len(values), -1)


def open_changes(ref: str, base: str | None = None) -> Changes:
    """Of a localized checkpoint or a merge: a folder, org/name or org/name@revision. Reads headers, and its masks.

    base: where the base is, if not where the manifest says.
    Raises RequestError unless its changes lie under masks over a base that is at hand.
    """
    source = open_source(parse_ref(ref))
    record = open_manifest(source)
    if record.is_localized:
        return LocalizedChanges(read_localized(source, record), _open_base(source, record, base))
    recipe = recipe_of(source)
    if recipe is None:
        raise CheckpointError(f"{source.label} lacks {RECIPE_FILE}, the recipe of the merge. Fetch it again.")
    check_masked(source.label, recipe, masked=bool(record.masks), new_rows=record.vocabulary is not None)
    merged = _open_merged(source, record)
    start = _open_base(source, record, base)
    return MergeChanges(merged, record, start, _open_masks(source, record))


def _open_base(source: Source, record: Manifest, base: str | None) -> Checkpoint:
    """Raises CheckpointError if it is not at hand, MismatchError if it is another one."""
    entry = next(entry for entry in record.inputs if entry.role == "base")
    opened, reasons = open_inputs([InputRef("base", base or entry.ref, base is not None)])
    if reasons:
        raise CheckpointError(f"{source.label} cannot be exported without its base ({reasons['base']}) Use --base REF.")
    if wrong := [str(finding) for finding in check_hashes(entry, opened["base"])]:
        raise MismatchError(
            [
                f"{opened['base'].label} is not the base of {source.label}, {entry.ref}; name that one with --base",
                *wrong,
            ]
        )
    return opened["base"]


def _open_merged(source: Source, record: Manifest) -> Checkpoint:
    merged = read_checkpoint(source)
    for shard in merged.shards:
        if shard.size != (due := record.outputs.get(shard.file, {}).get("size")):
            raise CheckpointError(
                f"{source.label}/{shard.file} has {shard.size} bytes, its manifest says {due}. Fetch it again."
            )
    return merged


def _open_masks(source: Source, record: Manifest) -> list[MaskFile]:
    """Raises CheckpointError or IntegrityError."""
    try:
        check_names(record)
    except ValueError as error:
        raise CheckpointError(f"the manifest of {source.label} is damaged ({error}). Fetch it again.") from error
    files = list(dict.fromkeys(mask.file for mask in record.masks.values()))
    if absent := [file for file in files if file not in source.files]:
        raise CheckpointError(f"{source.label} lacks {absent[0]}, which its manifest lists. Fetch it again.")
    return [MaskFile(source.fetch(file), f"{source.label}/{file}") for file in files]
