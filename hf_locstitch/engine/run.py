"""What every run shares: it finds masks, writes them and the shards, then all other files.

OUT appears whole or not at all.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hf_locstitch.artifacts.manifest import FILE, RECIPE_FILE, Manifest, to_json
from hf_locstitch.artifacts.mask_file import assemble_mask, encode_masks, mask_metadata
from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.artifacts.written_mask import WrittenMask
from hf_locstitch.checkpoints.byte_ranges import Pieces, files_of
from hf_locstitch.checkpoints.checkpoint import CARD
from hf_locstitch.checkpoints.hashes import InputHashes
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.engine.inputs import Inputs, all_here
from hf_locstitch.engine.record import FileHashes, check_pins, check_strict, finish, make_manifest, pinned_recipe
from hf_locstitch.engine.steps import FITTING, LOCALIZING, MERGING, READING, WRITING
from hf_locstitch.engine.work_dir import ShardRecord, WorkDir, fingerprint
from hf_locstitch.localize.job import LocalizeJob
from hf_locstitch.plan.division import Own, divided, divided_by_file
from hf_locstitch.plan.lineage import look
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, Plan, StitchPlan
from hf_locstitch.report.card import write_card
from hf_locstitch.report.figures.survey import FOLDER, Survey, draw_overlap, draw_survey, survey_merge
from hf_locstitch.runtime.files import write_text
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.stitch.fitting import FitJob
from hf_locstitch.stitch.view import StitchView

if TYPE_CHECKING:
    from hf_locstitch.report.publish import Upload
    from hf_locstitch.stitch.fitted_values import FittedValues

AnyPlan = TypeVar("AnyPlan", bound=Plan)
Drawn = tuple[Survey, list[str]]  # what is drawn, and the figures of it that do not need the overlaps
T = TypeVar("T")

LOG = logging.getLogger("hf_locstitch")
NOT_DRAWN = "the figures could not be drawn"


class Run(ABC, Generic[AnyPlan]):
    """One plan carried out in one process. Every process makes the same calls in the same order."""

    def __init__(
        self,
        plan: AnyPlan,
        work: WorkDir,
        processes: Processes,
        progress: Progress,
        hashes: InputHashes,
        upload: Upload | None = None,
    ) -> None:
        self.plan, self.work, self.processes, self.hashes, self.upload = plan, work, processes, hashes, upload
        self.progress = progress if processes.first else Progress(False)
        self.settings = plan.settings
        self.warnings: list[str] = []  # of this run, beside the plan's
        # Whether what comes from the Hub is not kept: of all processes, or of none.
        self.streamed = not plan.settings.cache and not all(processes.gather(all_here(plan)))
        count = processes.count
        self.owned = divided_by_file(plan, count) if self.streamed else divided(plan.shards, count)
        self.fitted: FittedValues | None = None
        self.examples: dict[str, int] = {}  # of each localization set, as many as there were
        self.verified_before = processes.gather(work.verified(count))[0]

    @abstractmethod
    def find_masks(self, inputs: Inputs) -> Mapping[str, MaskSource]:
        """The mask of each finetune, by name; none for a method without masks."""

    @abstractmethod
    def write_shards(
        self, inputs: Inputs, masks: Mapping[str, MaskSource], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        """The output's shards. Returns how the masks overlap, and what is known of each shard."""

    def read_later(self) -> Pieces:
        """What writing the shards will read of inputs that are streamed once, besides the masks."""
        return {}

    @abstractmethod
    def view(
        self,
        readers: Mapping[str, CheckpointReader],
        masks: Mapping[str, MaskSource],
        fitted: FittedValues | None = None,
    ) -> StitchView:
        """The view of the open inputs that values are fitted in, and written from."""

    def fit(self, inputs: Inputs, masks: Mapping[str, MaskSource], held: ExitStack) -> dict[str, Any] | None:
        """Fit values before shards are written, and return their record; None if nothing is fitted. held: closes what
        is opened for it, when all is written."""
        plan, fitting = self.plan, self.plan.recipe.fitting
        if fitting is None:
            return None
        readers = inputs.fetch().readers
        if self.processes.count > 1:  # each process has selected in its own tensors only
            masks = {
                name: WrittenMask(self.work.stage / plan.mask_file(name), part, readers[name])
                for name, part in masks.items()
            }
            for mask in masks.values():
                held.callback(mask.close)
        job = FitJob(
            view=self.view(readers, masks),
            readers=readers,
            order=plan.order,
            tensors=plan.mask_tensors,
            data=plan.fit_data,
            own=self.own,
            folder=self.work.spill / "fit",
            spill=self.work.spill,
            settings=plan.settings,
            processes=self.processes,
            progress=self.progress,
        )
        self.fitted, record = fitting.fit(job)
        return record

    def expect_side_files(self) -> None:
        """Let the files that `write_side_files` copies be fetched meanwhile."""

    def write_side_files(self) -> None:
        """Write the files that turn shards into a model."""

    def run(self) -> Manifest:
        began = time.monotonic()
        # Each process verifies what it reads; of files that all have in common, the first one tells.
        note = partial(self.work.note_verified, processes=self.processes)
        noted = note if self.first or self.streamed else lambda _: None
        opened = Inputs(
            self.plan, self.progress, self.work.spill, noted, self.hashes, self.processes, streamed=self.streamed
        )
        if self.first:
            self.expect_side_files()
        with opened as inputs, ThreadPoolExecutor(2) as background, ExitStack() as held:
            if self.processes.count > 1 and not self.streamed:
                self.processes.together(lambda: inputs.fetch_share(*self.processes.of_node))
                self.processes.together(inputs.fetch)
            self.progress.step(READING if isinstance(self.plan, StitchPlan) else LOCALIZING)
            masks = self.find_masks(inputs)
            for mask in masks.values():
                held.callback(mask.close)  # after a failure, too: not every system deletes files that are open
            with ThreadPoolExecutor(1) as aside:
                written = aside.submit(self._write_masks, masks)
                if self.processes.count > 1:  # collective calls need the same order everywhere
                    written.result()
                surveyed = aside.submit(self._survey, written)
                self.progress.step(FITTING)
                stitch = self.fit(inputs, masks, held)
                self.progress.step(WRITING if isinstance(self.plan, LocalizePlan) else MERGING)
                overlap, shards = self.write_shards(inputs, masks, background)
                drawn = surveyed.result()
        files = self.files
        records: list[Manifest] = []
        self.processes.on_first(lambda: records.append(self._finish(files, overlap, shards, drawn, stitch, began)))
        return self.processes.gather(records[0] if records else None)[0]  # type: ignore[return-value]

    @property
    def first(self) -> bool:
        return self.processes.first

    @property
    def own(self) -> Own:
        """The tensors that this process works on."""
        return self.owned[self.processes.rank]

    def _survey(self, written: Future[None]) -> Drawn | None:
        """Draw what the figures show about masks and inputs."""
        written.result()
        self.spared("the finetunes were not compared with the base and one another", self._compare)
        stage = self.work.stage
        if (survey := self.spared("the masks were not surveyed", lambda: survey_merge(self.plan, stage))) is None:
            return None
        files = self.spared(NOT_DRAWN, lambda: draw_survey(survey, stage / FOLDER))
        return None if files is None else (survey, files)

    def _figures(self, drawn: Drawn | None, overlap: Sequence[Mapping[str, Any]]) -> list[str]:
        """All figures' files, once the overlap is drawn, too, which is known when all shards are written."""
        if drawn is None:
            return []
        survey, files = drawn
        first = self.spared(NOT_DRAWN, lambda: draw_overlap(overlap, survey, self.work.stage / FOLDER))
        return [] if first is None else [*first, *files]

    def _compare(self) -> None:
        """What the plan would have warned of, had the weights been here."""
        plan = self.plan
        if isinstance(plan, StitchPlan) or not plan.finetuned.keys() - plan.adapters.keys() - plan.lineage.keys():
            return
        for warning in look(plan, fetch=False).warnings:
            if warning not in plan.warnings:
                self.warn(warning)

    def warn(self, warning: str) -> None:
        """Say it now, and on the card."""
        LOG.warning(warning)
        self.warnings.append(warning)

    def spared(self, without: str, make: Callable[[], T]) -> T | None:
        """What `make` makes, in the first process; None if it fails: what only people look at takes no merge down.

        without: what is missing then, for a warning.
        """
        if not self.first:
            return None
        try:
            return make()
        except Exception as error:
            self.warn(
                f"{without} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); the rest is complete."
            )
            return None

    @cached_property
    def files(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every file that the weights of an input come from."""
        own = self.processes.together(self.hashes.wait)
        files: dict[str, dict[str, str]] = {name: {} for name in self.plan.inputs}
        for results in self.processes.gather(own):
            for name, file, digest in results:
                files[name][file] = digest
        return files

    def _write_masks(self, masks: Mapping[str, MaskSource]) -> None:
        for file, name in {self.plan.mask_file(name): name for name in masks}.items():
            mask = masks[name]
            parts = self.work.spill / f"{name}.mask-{self.processes.rank}"
            encode = self.processes.together(
                lambda mask=mask, parts=parts: encode_masks(mask, self.own, parts, self.settings.workers)
            )
            places = self.processes.gather((parts, encode))
            write = partial(self._assemble, self.work.stage / file, name, mask.ones, places)
            self.processes.on_first(write)

    def _assemble(
        self, path: Path, name: str, ones: int, places: list[tuple[Path, dict[str, tuple[int, int]]]]
    ) -> None:
        plan, localizer = self.plan, self.plan.localizers[name]
        path.parent.mkdir(exist_ok=True)
        origin = ", ".join(sorted(plan.origins.values())) if localizer.joint else plan.origins[name]
        settings = localizer.model_dump(mode="json")
        metadata = mask_metadata(path.stem, plan.base.source.pinned, origin, settings, ones, plan.mask_tensors)
        assemble_mask(path, plan.mask_tensors, places, metadata)

    def _finish(
        self,
        files: FileHashes,
        overlap: Overlap,
        shards: Mapping[str, ShardRecord],
        drawn: Drawn | None,
        stitch: dict[str, Any] | None,
        began: float,
    ) -> Manifest:
        """Write everything except weights and masks."""
        plan, stage = self.plan, self.work.stage
        for checkpoint in plan.inputs.values():
            checkpoint.source.check_unchanged(checkpoint.files)
        check_pins(plan, files)
        self.write_side_files()
        record = make_manifest(plan, files, overlap, fingerprint(plan), stitch, self.examples)
        write_text(stage / RECIPE_FILE, pinned_recipe(plan, files))
        figures = self._figures(drawn, record.overlap)
        record = replace(record, warnings=[*record.warnings, *self.warnings])
        self.spared("the model card could not be written", lambda: write_card(plan, record, stage / CARD, figures))
        record = replace(record, warnings=list(dict.fromkeys([*record.warnings, *self.warnings])))
        check_strict(plan.recipe, record)
        known = {file: (shard.size, shard.sha256) for file, shard in shards.items()}
        record = finish(record, stage, known, time.monotonic() - began)
        write_text(stage / FILE, to_json(record))
        return record


def localize(run: Run[MergePlan] | Run[LocalizePlan], inputs: Inputs) -> Mapping[str, MaskSource]:
    """The masks that a plan's localizer finds."""
    plan, shared = run.plan, run.plan.shared

    def trusted(model: str, tensor: str) -> bool:
        """Whether the files that hold this tensor were verified when an earlier run read them."""
        files = ((name, file) for name in ("base", model) for file in files_of(plan.inputs[name], [tensor]))
        return (shared is not None and shared.verified) or all(file in run.verified_before for file in files)

    job = LocalizeJob(
        base=plan.base,
        finetuned=plan.finetuned,
        order=plan.order,
        tensors=plan.mask_tensors,
        groups=plan.groups,
        data=plan.data,
        inputs=inputs,
        own=run.own,
        folder=run.work.spill if shared is None else shared.folder,
        settings=plan.settings,
        processes=run.processes,
        progress=run.progress,
        kept=run.read_later(),
        trusted=trusted,
        allow_non_finite=plan.recipe.allow_non_finite,
        note_examples=run.examples.__setitem__,
        shared=shared,
    )
    masks = plan.localizer.find_masks(job)
    for name, mask in masks.items():
        if doubt := plan.localizer.doubt(mask.ones, plan.n):
            run.warn(f"the mask of {name} {doubt}")
    return masks
