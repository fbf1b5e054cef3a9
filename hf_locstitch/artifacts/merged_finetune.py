"""A finetune that a merge was made of, with the mask that the merge holds of it: to be stitched again.

The values under the mask are the finetuned model's own, and are read from there: where masks overlap, merged weights no
longer tell them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_locstitch.artifacts.manifest import JOINT, InputRecord, Manifest, mask_file, open_manifest
from hf_locstitch.artifacts.mask_file import FORMAT, MaskFile, parse_shapes
from hf_locstitch.checkpoints.checkpoint import Checkpoint, Shard, open_source, read_shard
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class MergedFinetune:
    """One finetune, and its mask in a merge.

    name: in the merge. source, record: the merge. mask: the header of its mask. shapes: of the localized tensors, by
    their names on disk. checkpoint: the finetune; its tensors have the base's names once it is laid over the base.
    """

    name: str
    source: Source = field(repr=False)
    record: Manifest = field(repr=False)
    mask: Shard = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    checkpoint: Checkpoint = field(repr=False)

    @property
    def label(self) -> str:
        return self.checkpoint.label

    @property
    def ones(self) -> int:
        return self.record.masks[self.name].ones

    @property
    def localizer(self) -> Mapping[str, Any]:
        """How the mask was found: the settings, as recorded. Raises ValueError, KeyError."""
        return json.loads(self.mask.header.metadata["localizer"])

    @property
    def base(self) -> InputRecord:
        return next(entry for entry in self.record.inputs if entry.role == "base")

    @property
    def finetuned(self) -> InputRecord:
        return next(entry for entry in self.record.inputs if entry.name == self.name)

    @property
    def mask_sha256(self) -> str:
        """As the merge's manifest has it."""
        return self.record.outputs[self.mask.file]["sha256"]

    def over(self, checkpoint: Checkpoint) -> MergedFinetune:
        """The same with the finetune laid over the base."""
        return replace(self, checkpoint=checkpoint)

    def open_mask(self) -> MaskFile:
        """Fetched, and checked against the manifest. Raises CheckpointError."""
        file = self.mask.file
        path, got = self.source.fetch(file), self.source.sha256(file)
        if got != self.mask_sha256:
            raise CheckpointError(
                f"{self.source.label}/{file} is damaged: it has sha256 {got}, expected {self.mask_sha256}. "
                "Fetch it again."
            )
        return MaskFile(path, f"{self.source.label}/{file}")


def open_merge(ref: Ref) -> tuple[Source, Manifest]:
    """A merge that can be taken apart. Raises CheckpointError, RecipeError with the reason why one cannot."""
    source = open_source(ref)
    record = open_manifest(source)
    anew = "Run its recipe with the finetunes wanted: hf-locstitch merge locstitch.yaml --ft REF..."
    if record.is_localized:
        raise RecipeError(f"{source.label} is a localized checkpoint, not a merge. Give it to --localized or --add.")
    if record.method != "locstitch":
        raise RecipeError(
            f"{source.label} was merged by {record.method}, not by locstitch: it does not consist of parts. {anew}"
        )
    if any(mask.file == mask_file(JOINT) for mask in record.masks.values()) and JOINT not in record.masks:
        raise RecipeError(
            f"the mask of {source.label} belongs to all of its finetunes together (a joint mask): none of them has one "
            f"of its own. {anew}"
        )
    if record.stitch is not None:
        raise RecipeError(
            f"the values of {source.label} were solved for with all of its finetunes together (a refit): without one "
            f"of them, or with another, they would be others. {anew}"
        )
    return source, record


def open_merged_finetune(merge: Ref, name: str, checkpoint: Checkpoint) -> MergedFinetune:
    """checkpoint: the finetune that the merge calls `name`. Raises CheckpointError, RecipeError."""
    source, record = open_merge(merge)
    if name not in record.masks:
        raise CheckpointError(
            f"{source.label} has no mask {name!r}: it has {', '.join(record.masks)}. Use one of them."
        )
    file = record.masks[name].file
    try:
        if file not in source.files or file not in record.outputs:
            raise ValueError(f"it lacks {file}")
        mask = read_shard(source, file)
        if (form := mask.header.metadata.get("format")) != FORMAT:
            raise ValueError(f"{file} has format {form!r}, expected {FORMAT!r}")
        found = MergedFinetune(name, source, record, mask, parse_shapes(mask.header.metadata), checkpoint)
        _ = found.base, found.finetuned, found.localizer, found.mask_sha256
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        fault = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the merge {source.label} is damaged ({fault}). Fetch it again.") from error
    return found
