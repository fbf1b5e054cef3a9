"""A refit without data: the values under the masks from the task vectors alone. And what it records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_locstitch.stitch.dataless.cost import STEPS
from hf_locstitch.stitch.dataless.solution import LOW_RANK_RIDGE, RIDGE
from hf_locstitch.stitch.dataless.solve import DatalessJob, DatalessSolver
from hf_locstitch.stitch.fitted_values import FittedValues, open_fitted
from hf_locstitch.stitch.fitting import FitJob
from hf_locstitch.stitch.refit.plain import PlainStitch

LOW_RANK_NOTE = (
    "Updates are of low rank, as those of adapters: their rows do not tell what a layer's inputs were, so the values "
    "stay near the mean of the task vectors. With some 64 unlabelled inputs of each task (data), a refit is far better."
)


def dataless_folder(spill: Path) -> Path:
    """Where finding a joint mask and fitting values meet. spill: for temporary files of the whole merge."""
    return spill / "dataless"


def fit_without_data(job: FitJob, device: str) -> tuple[FittedValues, dict[str, Any]]:
    """The fitted values, and what to record. Raises RequestError."""
    processes = job.processes
    shared = DatalessJob(job.readers, job.order, job.tensors, dataless_folder(job.spill), device, job.settings,
                         processes, job.progress)  # fmt: skip
    solver = DatalessSolver(shared)
    dense = solver.solve()
    folder, heading = shared.folder / "values", json.dumps({"chunk": job.settings.chunk})
    fitted = open_fitted(folder, heading, job.own, processes)
    if fitted is None:
        writer = solver.fit(dense, PlainStitch(job.view), job.view.scale, folder, heading)
        writer.finish(heading)
        fitted = open_fitted(folder, heading, job.own, processes)
        assert fitted is not None
    return fitted, {
        "ridge": LOW_RANK_RIDGE if dense.low_rank else RIDGE,
        "steps": STEPS,
        "low_rank": dense.low_rank,
        "refitted": sorted(fitted.names),
        "kept_plain": dict(sorted(solver.plain.items())),
        "notes": [LOW_RANK_NOTE] if dense.low_rank else [],
    }


def go_on_from(
    begun: FittedValues, begun_record: Mapping[str, Any], values: FittedValues | None, record: dict[str, Any]
) -> tuple[FittedValues, dict[str, Any]]:
    """What a fit to inputs ends with that started here. values: where it found better ones; record: its own."""
    fitted = begun if values is None else values.over(begun)
    without = {key: begun_record[key] for key in ("ridge", "steps", "low_rank")}
    kept = {name: reason for name, reason in record["kept_plain"].items() if name not in begun}
    return fitted, {
        **record,
        "without_data": without,
        "refitted": sorted(fitted.names),
        "kept_plain": {**begun_record["kept_plain"], **kept} if values is not None else begun_record["kept_plain"],
    }
