"""The rows of embeddings and heads that were matched by tokens, read once more from the models that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from hf_locstitch.checkpoints.aligned import Alignment
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.vocabulary import row_width
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.inspection.verification.values import PIECE, Differences
from hf_locstitch.runtime.dtypes import DTYPE, Values


def check_rows(
    matrix: str, merged: CheckpointReader, alignment: Alignment, own: Mapping[str, CheckpointReader]
) -> Iterator[Finding]:
    """Whether each row is its one model's, or the mean of several. own: the inputs as their files have them."""
    info = merged.checkpoint.info(matrix)
    width = row_width(info)
    step = max(1, PIECE // width)
    wrong = Differences(matrix, merged.where(matrix), info.shape)
    for first in range(0, alignment.rows, step):
        stop = min(first + step, alignment.rows)
        due = _due(matrix, alignment, own, first, stop).astype(DTYPE[info.dtype]).reshape(-1)
        wrong.compare(merged.values(matrix, first * width, (stop - first) * width), due, first * width)
    yield from wrong.findings()


def _due(matrix: str, alignment: Alignment, own: Mapping[str, CheckpointReader], first: int, stop: int) -> Values:
    """Rows first … stop [stop − first, width], in float32, or float64 if a model has that."""
    names = alignment.matrices[matrix]
    wide = any(own[model].checkpoint.info(name).dtype == "F64" for model, name in names.items())
    width = row_width(own["base"].checkpoint.info(matrix))
    total = np.full((stop - first, width), -0.0, np.float64 if wide else np.float32)
    times = np.zeros((stop - first, 1), total.dtype)
    for model, rows in alignment.sources["base"].items():
        for place in np.flatnonzero(rows[first:stop] >= 0).tolist():
            row = own[model].values(names[model], int(rows[first + place]) * width, width)
            total[place] += row.astype(total.dtype)
            times[place] += 1
    return np.where(times > 1, total / times, total)
