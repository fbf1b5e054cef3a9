"""Masks of localizers that look at data: scores first, then the same selection as without."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hf_locstitch.inputs import Inputs
from hf_locstitch.localize.learn import Room
from hf_locstitch.localize.load import find_load, settled
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.saliency import Saliency
from hf_locstitch.localize.scan import Scan
from hf_locstitch.localize.score import score
from hf_locstitch.localize.selection import Selection
from hf_locstitch.plan import MergePlan
from hf_locstitch.processes import Processes
from hf_locstitch.progress import Progress


def select_with_data(
    plan: MergePlan,
    inputs: Inputs,
    spill: Path,
    own: Collection[str],
    processes: Processes,
    progress: Progress,
) -> dict[str, Selection]:
    """The mask of each finetune, one after another. Raises RequestError or WorkError."""
    asked = plan.localizer
    assert isinstance(asked, Mask | Saliency)
    readers = inputs.fetch().readers
    selections: dict[str, Selection] = {}
    for name, data in plan.data.items():
        how = settled(asked, find_load(plan, asked, name), processes.count)
        with progress.bar(f"{how.method} {name}", 0, " examples") as advance:  # how many there are shows only later
            room = Room(spill, processes, advance)
            scores = score(how, name, readers["base"], readers[name], plan.localized, data, room)
        groups = plan.groups if scores.ones is None else [(list(range(len(plan.localized))), scores.ones)]
        selections |= Scan(
            plan.base,
            {name: plan.finetuned[name]},
            plan.localized,
            groups,
            spill,
            own=own,
            processes=processes,
            chunk=plan.settings.chunk,
            workers=plan.settings.workers,
            known=scores.bits,
        ).select(readers)
    return selections
