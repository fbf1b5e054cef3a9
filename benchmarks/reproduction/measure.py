"""All that is measured of one seed of a testbed, by the package's public functions on folders of this machine."""

from __future__ import annotations

import filecmp
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from quality import WEIGHTS, write_set

from hf_locstitch import load_localized, localize_from_hub, merge_from_hub, stitch_from_hub
from hf_locstitch.runtime.progress import hide_all_library_bars
from reproduction.beds import Bed
from reproduction.masks import layout, overlaps
from reproduction.record import Record
from reproduction.rows import COUNTED, REMEMBERED, Grid, Merge, magnitude, rows

Accuracies = Mapping[str, float]  # by task
SKILLS_AT = 0.1  # density of the merges that skills are added to and removed from


@dataclass(frozen=True)
class Seed:
    """bed: its base and experts. work: for what is made of them. say: told what is being measured."""

    bed: Bed
    grid: Grid
    work: Path
    record: Record
    say: Callable[[str], None]

    @property
    def main(self) -> Sequence[str]:
        """The tasks of most tables."""
        return self.bed.tasks[: self.bed.main]

    def measure(self) -> None:
        """Everything, in an order in which little is made twice."""
        ability = {"what": self.bed.ability.what, "better": self.bed.ability.better}
        self.record.note(tasks=list(self.bed.tasks), main=self.bed.main, measured=ability)
        self.base_and_experts()
        asked = rows(self.grid)
        counts = sorted({self.bed.main, *(count for count in self.grid.counts if count <= len(self.bed.tasks))})
        for count in (count for count in counts if count <= self.bed.main):
            self.measure_rows(asked, count)
        for merge in (one for merges in asked.values() for one in merges if one.stitched):
            self.masks(merge)
        self.skills()
        for count in (count for count in counts if count > self.bed.main):
            self.measure_rows(asked, count)

    # ---- merges -------------------------------------------------------------------------------------------------

    def base_and_experts(self) -> None:
        """Of an expert only its own task, and what is left of the base."""
        base = self.load(self.bed.folder / "base")
        self.known("base", "test", lambda: self.scores(base, self.main, "test"))
        for split in ("validation", "test"):
            self.known("experts", split, lambda s=split: {t: self.expert(t, s) for t in self.bed.tasks})
        measure = self.bed.ability.measure
        self.known("ability", "base", lambda: measure(base))
        self.known("ability", "experts", lambda: mean(measure(self.load(self.bed.folder / t)) for t in self.main))

    def expert(self, task: str, split: str) -> float:
        return self.bed.bed.accuracy(self.load(self.bed.folder / task), task, split)

    def measure_rows(self, asked: Mapping[str, Sequence[Merge]], count: int) -> None:
        """Those that are measured for so many tasks."""
        for name, merges in asked.items():
            if count == self.bed.main or name in COUNTED:
                self.row(name, merges, count)
        shutil.rmtree(self.work / "merges", ignore_errors=True)

    def row(self, name: str, merges: Sequence[Merge], count: int) -> None:
        """Its accuracies on test, and what is left of the base, of the merge that is best on validation."""
        best = merges[0] if len(merges) == 1 else max(merges, key=lambda merge: self.validated(merge, count))
        self.known("chosen", f"{count} {name}", lambda: best.name)
        self.known("test", f"{count} {best.name}", lambda: self.merged_scores(best, count, "test"))
        if count == self.bed.main and name in REMEMBERED:
            self.known("ability", best.name, lambda: self.of_merged(best, count, self.bed.ability.measure))

    def validated(self, merge: Merge, count: int) -> float:
        """Mean normalised accuracy on validation."""
        found = self.known(
            "validation", f"{count} {merge.name}", lambda: self.merged_scores(merge, count, "validation")
        )
        experts = self.record.content["experts"]["validation"]
        return mean(found[task] / experts[task] for task in found)

    def merged_scores(self, merge: Merge, count: int, split: str) -> Accuracies:
        tasks = self.bed.tasks[:count]
        return self.of_merged(merge, count, lambda model: self.scores(model, tasks, split))

    def of_merged(self, merge: Merge, count: int, judge: Callable[[Any], Any]) -> Any:
        """What a judge says of a merge of the first `count` tasks."""
        tasks = self.bed.tasks[:count]
        if not merge.stitched:
            return judge(self.load(self.merged(merge, tasks)))
        model = self.load(self.bed.folder / "base")
        for task in tasks:  # with all of them in it, the model is their merge, to the bit
            load_localized(self.localized(merge, task)).apply(model)
        return judge(model)

    def merged(self, merge: Merge, tasks: Sequence[str]) -> Path:
        """The folder of a merge by another method; one that is there is used again."""
        out = self.work / "merges" / f"{len(tasks)} {merge.name}"
        if not out.exists():
            merge_from_hub(
                self.bed.folder / "base",
                [self.bed.folder / task for task in tasks],
                out=out,
                method=merge.method,
                localizer=merge.localizer or None,
                scale=merge.scale,
                exclude=self.bed.heads or None,
                figures=False,
                show_progress=False,
            )
        return out

    def localized(self, merge: Merge, task: str) -> Path:
        """The folder of one task's localized checkpoint; one that is there is used again."""
        out = self.work / "localized" / merge.name / task
        if not out.exists():
            localize_from_hub(
                self.bed.folder / "base",
                self.bed.folder / task,
                out=out,
                localizer=merge.localizer,
                data=[self.localization_set(task)] if merge.looks_at_data else None,
                figures=False,
                show_progress=False,
            )
        return out

    def localization_set(self, task: str) -> dict[str, Any]:
        """The examples that the expert was finetuned on, as a recipe has them."""
        examples, fields = self.bed.bed.localization_set(task, "train")
        return write_set(self.bed.folder / f"{task}.train.jsonl", examples, "train", fields)

    # ---- masks --------------------------------------------------------------------------------------------------

    def masks(self, merge: Merge) -> None:
        """What each holds alone, how large it is as a file, where it lies and how much it shares with others."""
        if merge.localizer.get("scope") != "tensor":
            self.known("alone", merge.name, lambda: {task: self.alone(merge, task) for task in self.main})
        opened = {task: load_localized(self.localized(merge, task)) for task in self.main}
        self.known("overlap", merge.name, lambda: overlaps(opened))
        self.known("layout", merge.name, lambda: layout(opened))
        self.known("bytes", merge.name, lambda: {task: self.sizes(merge, task) for task in self.main})

    def alone(self, merge: Merge, task: str) -> float:
        """Accuracy at the task of the base with one mask."""
        model = self.load(self.bed.folder / "base")
        load_localized(self.localized(merge, task)).apply(model)
        return self.bed.bed.accuracy(model, task, "test")

    def sizes(self, merge: Merge, task: str) -> dict[str, int]:
        """Bytes of the mask's file, of the values', and of the finetuned model's weights."""
        folder = self.localized(merge, task)
        parts = {kind: next((folder / kind).iterdir()).stat().st_size for kind in ("masks", "values")}
        return {**parts, "finetuned": (self.bed.folder / task / WEIGHTS).stat().st_size}

    def skills(self) -> None:
        """Some tasks, one at a time, removed from the merge of all and added again."""
        for task in self.main[: self.grid.skills]:
            self.known("skills", task, lambda task=task: self.removed_and_added(task))

    def removed_and_added(self, task: str) -> dict[str, Any]:
        """same: whether weights are, byte for byte, those of one merge. test: of the merge without the task."""
        base, work, masks = self.bed.folder / "base", self.work / "skills", magnitude(SKILLS_AT)
        shutil.rmtree(work, ignore_errors=True)
        everyone = [self.bed.folder / name for name in self.main]
        stay = [folder for folder in everyone if folder.name != task]
        merge = partial(merge_from_hub, base, localizer=masks.localizer, figures=False, show_progress=False)
        stitch = partial(stitch_from_hub, base, figures=False, show_progress=False)
        merge(everyone, out=work / "all")
        merge(stay, out=work / "fewer")
        stitch(from_=work / "all", finetuned=stay, remove=task, out=work / "removed")
        stitch(from_=work / "removed", finetuned=stay, add=self.localized(masks, task), out=work / "added")
        same = {
            "removed": filecmp.cmp(work / "removed" / WEIGHTS, work / "fewer" / WEIGHTS, shallow=False),
            "added": filecmp.cmp(work / "added" / WEIGHTS, work / "all" / WEIGHTS, shallow=False),
        }
        found = {"same": same, "test": self.scores(self.load(work / "removed"), self.main, "test")}
        shutil.rmtree(work)
        return found

    # ---- parts --------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> Any:
        with hide_all_library_bars():
            return self.bed.bed.load(str(folder), "main")

    def scores(self, model: Any, tasks: Sequence[str], split: str) -> Accuracies:
        return {task: self.bed.bed.accuracy(model, task, split) for task in tasks}

    def known(self, part: str, name: str, measure: Callable[[], Any]) -> Any:
        """As the record has it, or measured now."""

        def told() -> Any:
            began = time.perf_counter()
            found = measure()
            self.say(f"[{time.strftime('%H:%M:%S')}] {part}: {name}, {time.perf_counter() - began:.1f} s")
            return found

        return self.record.get(part, name, told)
