"""Masks from scores: one pass over the base and all finetuned models, from local files or while they are downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.job import LocalizeJob
from hf_locstitch.localize.scan import Scan, ScoreBits
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.kernels import Scores

OwnScores = Callable[[str, int, Values, Values], npt.NDArray[Any] | None]


def find_by_scores(job: LocalizeJob, scores: ScoreBits | None) -> Mapping[str, MaskSource]:
    """The mask of each finetune: where its scores are largest; without scores, where |task vector| is.

    Raises RequestError or WorkError.
    """
    own = [info for info in job.tensors if info.name in job.own]
    nbytes = sum(checkpoint.info(info.name).nbytes for checkpoint in job.finetuned.values() for info in own)
    with (
        job.progress.bar("localizing", nbytes) as advance,
        Scan(
            job.base,
            job.finetuned,
            job.tensors,
            job.groups,
            job.folder,
            own=job.own,
            processes=job.processes,
            chunk=job.settings.chunk,
            workers=job.settings.workers,
            trusted=job.trusted,
            allow_non_finite=job.allow_non_finite,
            scores=scores,
            shared=job.shared,
            advance=advance,
        ) as scan,
    ):
        if job.inputs.all_here:
            return scan.select(job.inputs.fetch().readers)
        selections = scan.begin()
        with job.inputs.opened(scan.pieces(selections), kept=job.kept) as opened:
            scan.stream(opened.readers, selections)
            job.processes.together(opened.verify)
        for selection in selections.values():
            selection.settle(job.settings.workers)
        return selections


def checked_scores(localizer: str, scores: OwnScores) -> ScoreBits:
    """A localizer's own scores as bits. Raises RequestError if they are invalid."""

    def bits(tensor: str, first: int, finetuned: Values, base: Values) -> Scores:
        values = np.ascontiguousarray(scores(tensor, first, finetuned, base), dtype=np.float32)
        if values.shape != base.shape or not (np.isfinite(values) & (values >= 0)).all():
            raise RequestError(
                f"the localizer {localizer} returned scores of shape {list(values.shape)}, from "
                f"{values.min(initial=0)} to {values.max(initial=0)}, for the {len(base)} elements of {tensor}; "
                "expected one finite, non-negative score per element. Fix the localizer."
            )
        return (values + np.float32(0)).view(np.int32)  # −0 counts as 0

    return bits
