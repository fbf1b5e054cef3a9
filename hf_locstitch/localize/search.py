"""Masks from scores: one pass over the base and all finetuned models, from files here or on their way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.localizer import LocalizeJob, Localizer
from hf_locstitch.localize.scan import Scan, ScoreBits
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.kernels import Scores


def find_by_scores(localizer: Localizer, job: LocalizeJob) -> Mapping[str, MaskSource]:
    """Arguments and errors as of Localizer.find_masks."""
    own = [info for info in job.tensors if info.name in job.own]
    nbytes = sum(checkpoint.info(info.name).nbytes for checkpoint in job.finetuned.values() for info in own)
    with job.progress.bar("localizing", nbytes) as advance:
        scan = Scan(
            job.base,
            job.finetuned,
            job.tensors,
            job.groups,
            job.folder,
            own=job.own,
            processes=job.processes,
            chunk=job.settings.chunk,
            workers=job.settings.workers,
            device=job.processes.device(job.settings.device),
            trusted=job.trusted,
            allow_non_finite=job.allow_non_finite,
            scores=score_bits(localizer),
            advance=advance,
        )
        if job.inputs.all_here:
            return scan.select(job.inputs.fetch().readers)
        selections = scan.begin()
        with job.inputs.opened(scan.pieces(selections), kept=job.kept) as opened:
            scan.stream(opened.readers, selections)
            opened.verify()
        for selection in selections.values():
            selection.settle(job.settings.workers)
        return selections


def score_bits(localizer: Localizer) -> ScoreBits | None:
    """The localizer's own scores as their bits; None where it has none, and magnitudes serve. Raises RequestError."""
    if type(localizer).scores is Localizer.scores:
        return None

    def bits(tensor: str, first: int, finetuned: Values, base: Values) -> Scores:
        scores = localizer.scores(tensor, first, finetuned, base)
        found = np.ascontiguousarray(scores, dtype=np.float32)
        if found.shape != base.shape or (len(found) and float(found.min()) < 0):
            raise RequestError(
                f"the localizer {localizer.method} gives {list(found.shape)} scores, the least {found.min(initial=0)}, "
                f"for {len(base)} elements of {tensor}; due is one for each, not negative. Mend the localizer."
            )
        return (found + np.float32(0)).view(np.int32)  # −0 counts as 0

    return bits
