"""A localized checkpoint as files: masks/NAME.safetensors, values/NAME.safetensors and the manifest.

Each localized tensor has its finetuned values under its own name: [ones], in ascending flat order, in the finetuned
dtype. So nothing is lost: where the mask is one, the finetuned bits are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_locstitch.artifacts.manifest import FILE, InputRecord, Manifest, check_names, open_manifest, weights_sha256
from hf_locstitch.artifacts.mask_file import FORMAT as MASK_FORMAT
from hf_locstitch.artifacts.mask_file import MaskFile, Positions, parse_shapes
from hf_locstitch.artifacts.values_file import FORMAT as VALUES_FORMAT
from hf_locstitch.checkpoints.checkpoint import Checkpoint, Shard, open_source, read_card, read_shard
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from hf_locstitch.checkpoints.mapped import MappedFile
    from hf_locstitch.runtime.dtypes import Values


@dataclass(frozen=True)
class LocalizedCheckpoint:
    """One finetune reduced to its mask and the values under it.

    shapes: of the localized tensors, by their names on disk. ones: of the mask, among N elements. base, finetuned:
    what it was made from, pinned. The tensors' contents are read on demand, from files that are fetched
    then; `verify` checks them against the manifest's hashes.
    """

    source: Source = field(repr=False)
    record: Manifest = field(repr=False)
    shards: tuple[Shard, Shard] = field(repr=False)
    """Of the mask and of the values."""
    localizer: Mapping[str, Any]
    """How the mask was found: the settings, as recorded."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def name(self) -> str:
        return next(iter(self.record.masks))

    @property
    def ones(self) -> int:
        return self.record.masks[self.name].ones

    @property
    def N(self) -> int:
        return self.record.N

    @property
    def refitted(self) -> bool:
        """Whether its values were solved for again, and are not the finetuned model's own."""
        return self.record.stitch is not None

    @property
    def density(self) -> float:
        """ones / N."""
        return self.record.masks[self.name].real_density

    @property
    def content(self) -> str:
        """One hash of its mask and values, wherever they lie: of those that its manifest states."""
        return weights_sha256({shard.file: self.record.outputs[shard.file]["sha256"] for shard in self.shards})

    @property
    def identity(self) -> tuple[str, str, str]:
        """What tells it from any other, wherever it lies; in this order a stitch sums values."""
        return (self.finetuned.ref, weights_sha256(self.finetuned.files), self.content)

    @property
    def base(self) -> InputRecord:
        return next(entry for entry in self.record.inputs if entry.role == "base")

    @property
    def finetuned(self) -> InputRecord:
        return next(entry for entry in self.record.inputs if entry.role != "base")

    def positions(self, tensor: str) -> Positions:
        """Ascending flat indices of the mask's ones. Returns int64 [ones]. Raises IntegrityError, KeyError."""
        return self._mask.positions(tensor)

    def iter_positions(self, tensor: str) -> Iterator[Positions]:
        """As `positions`, a part at a time."""
        return self._mask.iter_positions(tensor)

    def values(self, tensor: str, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Finetuned values at the ones, or `count` of them from number `first` on.

        Returns [count] in the finetuned dtype. Raises KeyError.
        """
        from hf_locstitch.checkpoints.tensors import as_tensor

        return as_tensor(self.read(tensor, first, self._values[tensor].numel - first if count is None else count))

    def read(self, tensor: str, first: int, count: int) -> Values:
        """The same in numpy."""
        from hf_locstitch.checkpoints.reader import read_values

        return read_values(self._values_file, self._values[tensor], first, count)

    def mask(self, tensor: str) -> torch.Tensor:
        """Returns bool [*shape]. Raises IntegrityError, KeyError."""
        return self._mask.mask(tensor)

    def apply(self, model: Any) -> None:
        """Put its values under its mask into a loaded model, in place.

        With several of them in a model, its weights are those that `stitch` gives, to the bit.

        Args:
            model: A transformers model of the base, as `from_pretrained` loads it, in any floating dtype, on any
                devices; also with `torch.compile` or data parallelism around it.

        Raises:
            TypeError: If it is no transformers model.
            MismatchError: If the model lacks its tensors, or has them in other shapes.
            RequestError: If it is in the model already, or the model's parameters cannot be written into: they are
                quantized, offloaded or sharded, or changed by PEFT. The model is then as before.

        Example:
            >>> skill = load_localized("me/math-localized")
            >>> skill.apply(model)  # doctest: +SKIP
            >>> skill.remove(model)  # doctest: +SKIP
        """
        from hf_locstitch.artifacts.grafts import apply_graft

        apply_graft(self, model)

    def remove(self, model: Any) -> None:
        """Take it out of a model that it was applied to: every weight is then what it would be without it, to the bit.

        Args:
            model: That model.

        Raises:
            TypeError: If it is no transformers model.
            RequestError: If it is not in the model, or weights under it have changed since, such as by training. The
                model is then as before.
        """
        from hf_locstitch.artifacts.grafts import remove_graft

        remove_graft(self, model)

    def stored(self, tensor: str) -> TensorInfo:
        """Of a tensor's values: dtype, and how many there are."""
        return self._values[tensor]

    def as_checkpoint(self) -> Checkpoint:
        """Its two files, to fetch and hash; their tensors are not those of a model."""
        return Checkpoint(self.source, self.shards, {}, read_card(self.source), {})

    @cached_property
    def _mask(self) -> MaskFile:
        file = self.shards[0].file
        return MaskFile(self.source.fetch(file), f"{self.label}/{file}")

    @cached_property
    def _values(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.shards[1].header.tensors}

    @cached_property
    def _values_file(self) -> MappedFile:
        from hf_locstitch.checkpoints.mapped import MappedFile

        return MappedFile(self.source.fetch(self.shards[1].file))


def load_localized(ref: str | Path) -> LocalizedCheckpoint:
    """Open a localized checkpoint: a folder, org/name or org/name@revision. Only its small files are fetched at first.

    Raises CheckpointError if it is not a localized checkpoint, or its headers show damage.
    """
    return open_localized(parse_ref(str(ref)))


def open_localized(ref: Ref) -> LocalizedCheckpoint:
    """As load_localized."""
    source = open_source(ref)
    if FILE not in source.files:
        raise CheckpointError(
            f"{source.label} has no {FILE}, so it is not a localized checkpoint. Make one from a finetuned model "
            "with hf-locstitch localize."
        )
    record = open_manifest(source)
    if not record.is_localized:
        raise CheckpointError(
            f"{source.label} is a merged model, not a localized checkpoint. Use one made by hf-locstitch localize."
        )
    return read_localized(source, record)


def read_localized(source: Source, record: Manifest) -> LocalizedCheckpoint:
    """record: of a localized checkpoint. Raises CheckpointError."""
    try:
        ((_, entry),) = record.masks.items()
        check_names(record)
        files = entry.file, str(entry.values)
        _check_sizes(source, record, files)
        mask, values = (read_shard(source, file) for file in files)
        shapes = parse_shapes(mask.header.metadata)
        localized = LocalizedCheckpoint(source, record, (mask, values), dict(record.localizer or {}), shapes)
        _check_headers(localized)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        fault = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise CheckpointError(
            f"the localized checkpoint {source.label} is damaged ({fault}). Fetch it again."
        ) from error
    return localized


def _check_sizes(source: Source, record: Manifest, files: tuple[str, str]) -> None:
    """Check the list of files. Raises ValueError."""
    for file in files:
        if file not in source.files:
            raise ValueError(f"it lacks {file}, which its manifest lists")
        info, due = source.files[file], record.outputs[file]
        if info.size != due["size"]:
            raise ValueError(f"{file} has {info.size} bytes, its manifest says {due['size']}")
        if info.sha256 not in (None, due["sha256"]):
            raise ValueError(f"{file} has sha256 {info.sha256}, its manifest says {due['sha256']}")


def _check_headers(checkpoint: LocalizedCheckpoint) -> None:
    """Raises ValueError."""
    for shard, due in zip(checkpoint.shards, (MASK_FORMAT, VALUES_FORMAT), strict=True):
        if (form := shard.header.metadata.get("format")) != due:
            raise ValueError(f"{shard.file} has format {form!r}, expected {due!r}")
        if unlike := sorted({info.name for info in shard.header.tensors} ^ checkpoint.shapes.keys()):
            raise ValueError(f"{shard.file} and the shapes of the mask disagree on {unlike[0]}")
    for name, shape in checkpoint.shapes.items():
        info = checkpoint.stored(name)
        if not info.floating or info.numel > math.prod(shape):
            raise ValueError(
                f"{checkpoint.shards[1].file} holds {info.dtype} {list(info.shape)} for {name}, which is {list(shape)}"
            )
    if (count := sum(checkpoint.stored(name).numel for name in checkpoint.shapes)) != checkpoint.ones:
        raise ValueError(f"{checkpoint.shards[1].file} holds {count} values, but the mask has {checkpoint.ones} ones")
    if (stated := checkpoint.shards[0].header.metadata.get("ones")) != str(checkpoint.ones):
        raise ValueError(f"its mask states {stated} ones, its manifest {checkpoint.ones}")
    if (n := sum(map(math.prod, checkpoint.shapes.values()))) != checkpoint.N:
        raise ValueError(f"its mask ranges over {n} elements, its manifest says N = {checkpoint.N}")
    _ = checkpoint.base, checkpoint.finetuned
