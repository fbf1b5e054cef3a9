"""A localized checkpoint: its mask, and its values against its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, read_localized
from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, LocstitchError
from hf_locstitch.inspection.verification.fitted import Fit, refitted_names
from hf_locstitch.inspection.verification.grafts import GraftReader
from hf_locstitch.inspection.verification.inputs import InputRef, check_hashes, fetch_tensors, open_inputs
from hf_locstitch.inspection.verification.masks import check_masks, open_masks, top_k
from hf_locstitch.inspection.verification.report import Finding, Notes
from hf_locstitch.inspection.verification.sample import Tensors, sample
from hf_locstitch.inspection.verification.values import MergeSettings, ValueCheck
from hf_locstitch.runtime.progress import Progress


def check_localized(
    source: Source, record: Manifest, refs: Sequence[InputRef], tensors: Tensors, progress: Progress, notes: Notes
) -> None:
    """Raises CheckpointError for an input that the user named and that cannot be opened."""
    try:
        given = read_localized(source, record)
    except CheckpointError as error:
        notes.findings.append(Finding("files", source.label, "the localized checkpoint", str(error), "readable"))
        return
    masks, damaged = open_masks(source, record)
    ranged = [TensorInfo(name, given.stored(name).dtype, shape, 0, 0) for name, shape in given.shapes.items()]
    if not check_masks(record, masks, damaged, ranged, notes):
        notes.skip("values", "the mask cannot be used")
        return
    inputs, reasons = open_inputs(refs)
    if reasons:
        notes.skip("values", f"{' '.join(reasons.values())} Name them with --base REF and --ft REF...")
        return
    notes.findings += _unlike_counts(given)
    try:
        for entry in record.inputs:
            notes.findings += check_hashes(entry, inputs[entry.name])
        _values(given, inputs, masks, tensors, progress, notes)
    except LocstitchError as error:
        notes.skip("values", str(error))


def _unlike_counts(given: LocalizedCheckpoint) -> Iterator[Finding]:
    """As many values are stored for each tensor as its mask has ones."""
    for name in given.shapes:
        if (stored := given.stored(name).numel) != (ones := len(given.positions(name))):
            yield Finding("values", name, "the number of values", stored, f"{ones}, the number of ones of its mask")


def _values(
    given: LocalizedCheckpoint,
    inputs: Mapping[str, Checkpoint],
    masks: Mapping[str, MaskFile],
    tensors: Tensors,
    progress: Progress,
    notes: Notes,
) -> None:
    """Raises LocstitchError if an input cannot be read."""
    record, looked_at = given.record, sample(given.shapes, tensors)
    opened = {name: fetch_tensors(checkpoint, looked_at) for name, checkpoint in inputs.items()}
    finetuned = {given.name: opened[given.name]}
    refitted = refitted_names(record)
    check = ValueCheck(
        GraftReader(given, opened["base"]),
        opened["base"],
        opened["base"],
        finetuned,
        finetuned,
        masks,
        MergeSettings(1.0, top_k(record, notes), refitted),
    )
    with (
        progress.bar("values", sum(given.stored(name).nbytes for name in looked_at)) as advance,
        np.errstate(all="ignore"),
    ):
        for name in looked_at:
            notes.findings += check.localized(name)
            advance(given.stored(name).nbytes)
    notes.findings += check.kept_the_largest()
    own = [name for name in looked_at if name not in refitted]  # outside the mask nothing is stored
    notes.count(
        inputs=len(inputs),
        tensors=len(own),
        of_tensors=len(given.shapes),
        coordinates=sum(given.stored(name).numel for name in own),
    )

    if refitted:
        from hf_locstitch.inspection.verification.refits import check_refit  # slow to import

        fit = Fit(
            merged=lambda names: GraftReader(given, fetch_tensors(inputs["base"], names)),
            inputs=lambda names: {name: fetch_tensors(one, names) for name, one in inputs.items()},
            order=[given.name],
            masks=masks,
            record=record,
            scale=1.0,
        )
        check_refit(fit, given.shapes, tensors, progress, notes)
