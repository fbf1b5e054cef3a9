"""Carries a plan out: fetch, localize, merge, write. OUT appears whole or not at all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch import manifest
from hf_locstitch.allocator import freed_memory_goes_back
from hf_locstitch.card import write_card
from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE
from hf_locstitch.checkpoints.side_files import copy_side_files
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter, sync_file
from hf_locstitch.chunks import one_torch_thread
from hf_locstitch.figures.main import Survey, draw_merge, survey_merge
from hf_locstitch.hashes import InputHashes
from hf_locstitch.inputs import Inputs, OpenInputs
from hf_locstitch.localize.scan import Scan
from hf_locstitch.localize.selection import Keeper
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.masks import assemble_mask, encode_masks, mask_metadata
from hf_locstitch.merger import Merger, Overlap
from hf_locstitch.output import OutputShard
from hf_locstitch.plan import MergePlan
from hf_locstitch.processes import Processes, divide
from hf_locstitch.progress import Progress
from hf_locstitch.workplace import ShardRecord, Workplace, fingerprint, workplace

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.reader import CheckpointReader
    from hf_locstitch.publish import Upload
    from hf_locstitch.refit.values import Refitted


def run(
    plan: MergePlan,
    out: Path,
    progress: Progress,
    hashes: InputHashes,
    processes: Processes | None = None,
    upload: Upload | None = None,
    publish: Callable[[Path], object] | None = None,
) -> manifest.Manifest:
    """Merge into the folder `out`. Raises RequestError, or WorkError after which the same call goes on.

    upload: is given each shard as soon as it is finished. publish: is called with the finished folder instead of
    moving it to `out`.
    """
    processes = processes or Processes()
    kind = Run
    if plan.target == "localized":
        from hf_locstitch.localized.run import LocalizeRun as kind  # a Run itself
    with ExitStack() as stack:
        if _runs_models(plan):
            stack.enter_context(one_torch_thread())
            stack.enter_context(freed_memory_goes_back())
        place = stack.enter_context(workplace(plan, out, None if publish else out, processes))
        record = kind(plan, place, processes, progress, hashes, upload).run()
        if publish is not None and processes.first:
            publish(place.stage)
        if upload is not None:
            upload.pause()  # the files are about to move
        return record


def _runs_models(plan: MergePlan) -> bool:
    """Whether torch does some of the work; it takes longer to import than small models to merge."""
    with_data = plan.localizes and isinstance(plan.localizer, WithData)
    return with_data or plan.recipe.stitch is not None or plan.settings.device != "cpu"


class Run:
    """One merge in one process. Every process makes the same calls in the same order."""

    def __init__(
        self,
        plan: MergePlan,
        place: Workplace,
        processes: Processes,
        progress: Progress,
        hashes: InputHashes,
        upload: Upload | None = None,
    ) -> None:
        self.plan, self.place, self.processes, self.hashes, self.upload = plan, place, processes, hashes, upload
        self.progress = progress if processes.first else Progress(False)
        self.settings = plan.settings
        tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
        owners = divide([tensor.nbytes for tensor in tensors], processes.count)
        self.own = {t.name for t, owner in zip(tensors, owners, strict=True) if owner == processes.rank}
        self.refitted: Refitted | None = None
        self.stitch: dict[str, Any] | None = None  # what is recorded of a refit
        self.verified_before = processes.gather(place.verified())[0]

    def run(self) -> manifest.Manifest:
        began = time.monotonic()
        note = self.place.note_verified if self._first else lambda _: None
        with Inputs(self.plan, self.progress, self.place.spill, note) as inputs, ThreadPoolExecutor(2) as background:
            if self.processes.count > 1:
                self.processes.together(inputs.fetch)
            if self.plan.given:
                manifest.check_pins(self.plan, self.files)  # before anything is made of them
            selections = self.localize(inputs) if self.plan.masked else {}
            with ThreadPoolExecutor(1) as aside:
                masks = aside.submit(self.write_masks, selections)
                if self.processes.count > 1:  # all talk to each other in the same order
                    masks.result()
                surveyed = aside.submit(self._survey, masks)
                self.refitted, self.stitch = self.refit(inputs, selections)
                overlap, shards = self.write_shards(inputs, selections, background)
                found = surveyed.result()
            for selection in selections.values():
                selection.close()
        files = self.files
        records: list[manifest.Manifest] = []
        self.processes.on_first(lambda: records.append(self.finish(files, overlap, shards, found, began)))
        return self.processes.gather(records[0] if records else None)[0]  # type: ignore[return-value]

    def _survey(self, masks: Future[None]) -> Survey | None:
        """What the figures show of masks and inputs."""
        masks.result()
        return survey_merge(self.plan, self.place.stage) if self._first else None

    @cached_property
    def files(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every shard of every input."""
        own = self.processes.together(self.hashes.wait)
        files: dict[str, dict[str, str]] = {name: {} for name in self.plan.inputs}
        for results in self.processes.gather(own):
            for name, file, digest in results:
                files[name][file] = digest
        return files

    def localize(self, inputs: Inputs) -> Mapping[str, Keeper]:
        """The mask of each finetune."""
        plan = self.plan
        if plan.given:
            return self._read_given()
        if isinstance(plan.localizer, WithData):
            from hf_locstitch.localize.select_with_data import select_with_data  # slow to import

            return select_with_data(plan, inputs, self.place.spill, self.own, self.processes, self.progress)
        tensors = plan.localized
        own = [tensor for tensor in tensors if tensor.name in self.own]
        nbytes = sum(checkpoint.info(tensor.name).nbytes for checkpoint in plan.finetuned.values() for tensor in own)
        with self.progress.bar("localizing", nbytes) as advance:
            scan = Scan(
                plan.base,
                plan.finetuned,
                tensors,
                plan.groups,
                self.place.spill,
                own=self.own,
                processes=self.processes,
                chunk=self.settings.chunk,
                workers=self.settings.workers,
                device=self.processes.device(self.settings.device),
                trusted=self._trusted,
                allow_non_finite=plan.recipe.allow_non_finite,
                advance=advance,
            )
            if plan.all_here:
                return scan.select(inputs.fetch().readers)
            selections = scan.begin()
            rest = {name: pieces for name, pieces in plan.combined(self._unfinished()).items() if name != "base"}
            with inputs.opened(scan.pieces(selections), kept=rest) as opened:
                scan.stream(opened.readers, selections)
                opened.verify()
            for selection in selections.values():
                selection.settle(self.settings.workers)
            return selections

    def _read_given(self) -> Mapping[str, Keeper]:
        """Masks and values that were found before."""
        from hf_locstitch.localized.selection import GivenSelection

        plan, settings, selections = self.plan, self.settings, {}
        suffix = f"{self.processes.rank}-of-{self.processes.count}"
        with self.progress.bar("reading", sum(one.shards[1].size for one in plan.given.values())) as advance:
            for name, one in plan.given.items():
                spill = self.place.spill / f"{name}.{suffix}"
                selections[name] = GivenSelection(one, plan.localized, spill, settings.chunk)
                self.processes.together(lambda found=selections[name]: found.read(self.own, settings.workers, advance))
        return selections

    def _trusted(self, model: str, tensor: str) -> bool:
        """Whether what an earlier process took from the files that hold this tensor was right."""
        inputs = self.plan.inputs
        return all((name, inputs[name].tensors[tensor][0].file) in self.verified_before for name in ("base", model))

    def _unfinished(self) -> list[OutputShard]:
        return [shard for shard in self.plan.shards if self._finished[shard.file] is None]

    @cached_property
    def _finished(self) -> dict[str, ShardRecord | None]:
        """What earlier processes made of each shard of the output."""
        found = {shard.file: self.place.finished(shard.file) for shard in self.plan.shards} if self._first else {}
        return self.processes.gather(found)[0]

    def refit(self, inputs: Inputs, selections: Mapping[str, Keeper]) -> tuple[Refitted | None, dict[str, Any] | None]:
        """The values under the masks, or of whole tensors, if they are to be fitted, and what to record of that."""
        if self.plan.recipe.stitch is None:
            return None, None
        if not self.plan.masked:
            from hf_locstitch.refit.regmean import regmean  # slow to import

            return regmean(self.plan, inputs, self.place.spill / "regmean", self.own, self.processes, self.progress)
        from hf_locstitch.refit.refit import refit  # slow to import
        from hf_locstitch.refit.written_mask import WrittenMask

        if self.processes.count > 1:  # each has selected in its own tensors only
            masks, readers = self.place.stage / "masks", inputs.fetch().readers
            selections = {
                name: WrittenMask(masks / f"{name}.safetensors", part, readers[name])
                for name, part in selections.items()
            }
        folder = self.place.spill / "refit"
        return refit(self.plan, inputs, selections, folder, self.progress, self.own, self.processes)

    def write_masks(self, selections: Mapping[str, Keeper]) -> None:
        for name, selection in selections.items():
            parts = self.place.spill / f"{name}.mask-{self.processes.rank}"
            encode = self.processes.together(
                lambda selection=selection, parts=parts: encode_masks(selection, self.own, parts, self.settings.workers)
            )
            places = self.processes.gather((parts, encode))
            self.processes.on_first(
                lambda name=name, ones=selection.ones, places=places: self._assemble(name, ones, places)
            )

    def _assemble(self, name: str, ones: int, places: list[tuple[Path, dict[str, tuple[int, int]]]]) -> None:
        (self.place.stage / "masks").mkdir(exist_ok=True)
        path = self.place.stage / "masks" / f"{name}.safetensors"
        assemble_mask(path, self.plan.localized, places, mask_metadata(self.plan, name, ones))

    def write_shards(
        self, inputs: Inputs, selections: Mapping[str, Keeper], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        """The output's shards. Returns how the masks overlap, and what is known of each shard."""
        hashed: dict[str, Future[ShardRecord]] = {}
        noted: list[Future[None]] = []
        todo = self._unfinished()
        with (
            self.progress.bar("merging", sum(shard.nbytes for shard in self.plan.shards)) as advance,
            ThreadPoolExecutor(1) as journal,
            inputs.opened(self.plan.combined(todo)) as opened,
        ):
            merger = Merger(
                self.plan,
                self._standing_in(opened.readers),
                selections,
                self.own,
                self.refitted if self.plan.masked else None,
                chunk=self.settings.chunk,
                workers=self.settings.workers,
                advance=advance,
            )
            for shard in self.plan.shards:
                if shard in todo:
                    self._await_room(hashed.values())
                    overlap, sha256 = self._write_shard(merger, shard)
                    if self._first:
                        hashed[shard.file] = background.submit(self._finish_shard, shard, overlap, sha256)
                        noted.append(journal.submit(self._note, shard, hashed[shard.file], opened))
                else:
                    advance(shard.nbytes)
            self.processes.together(lambda: [future.result() for future in noted])
            done = {file: future.result() for file, future in hashed.items()}
        records = {**self._finished, **self.processes.gather(done)[0]}
        shards = {file: record for file, record in records.items() if record is not None}
        total = Overlap.none(len(self.plan.finetuned))
        for record in shards.values():
            total += Overlap(np.array(record.covered), np.array(record.pairs))
        return total, shards

    def _standing_in(self, readers: Mapping[str, CheckpointReader]) -> Mapping[str, CheckpointReader]:
        """With a dense method's fitted values in place of every finetuned model's own: their mean is the fitted."""
        if self.plan.masked or self.refitted is None:
            return readers
        from hf_locstitch.refit.values import StandIn

        return {
            name: StandIn(reader, self.refitted) if name in self.plan.finetuned else reader
            for name, reader in readers.items()
        }

    def _await_room(self, hashed: Iterable[Future[ShardRecord]]) -> None:
        """Where shards go as soon as they are uploaded, one waits while the next is written, and no more."""
        if self._first and self.upload is not None and self.upload.discard:
            for future in hashed:
                future.result()
            self.upload.wait(1)

    def _write_shard(self, merger: Merger, shard: OutputShard) -> tuple[Overlap, str | None]:
        """How the masks overlap in it, and its SHA-256 where one process writes it all."""
        path = self.place.stage / shard.file
        self.processes.on_first(lambda: SafetensorsWriter(path, shard.entries, shard.metadata).close())
        if self.processes.count == 1:
            return merger.write(shard, path)
        own = self.processes.together(lambda: merger.write_part(shard, path))
        return Overlap(self.processes.sum(own.covered), self.processes.sum(own.pairs)), None

    def _finish_shard(self, shard: OutputShard, overlap: Overlap, sha256: str | None) -> ShardRecord:
        """Let a written shard go up as soon as it is on the disk: nobody sees it before the commit."""
        path = self.place.stage / shard.file
        sync_file(path)
        record = ShardRecord(
            sha256 or file_sha256(path), path.stat().st_size, overlap.covered.tolist(), overlap.pairs.tolist()
        )
        if self.upload is not None:
            self.upload.add(self.place.stage, shard.file)
        return record

    def _note(self, shard: OutputShard, hashed: Future[ShardRecord], opened: OpenInputs) -> None:
        """Journal a shard once all that was read for it proved right."""
        record = hashed.result()
        opened.verify(tensor.name for tensor in shard.tensors)
        self.place.record(shard.file, record)

    @property
    def _first(self) -> bool:
        return self.processes.first

    def write_side_files(self) -> None:
        """What makes a model of its shards."""
        write_index(self.plan, self.place.stage)
        copy_side_files(self.plan.files.source, self.place.stage, self.plan.recipe.dtype)

    def finish(
        self,
        files: manifest.FileHashes,
        overlap: Overlap,
        shards: Mapping[str, ShardRecord],
        found: Survey | None,
        began: float,
    ) -> manifest.Manifest:
        """Everything beside weights and masks."""
        plan, stage = self.plan, self.place.stage
        manifest.check_pins(plan, files)
        self.write_side_files()
        record = manifest.make_manifest(plan, files, overlap, fingerprint(plan), self.stitch)
        (stage / manifest.RECIPE_FILE).write_text(manifest.pinned_recipe(plan, files), encoding="utf-8")
        figures = draw_merge(record, found, stage)
        write_card(plan, record, stage / "README.md", figures)
        known = {file: (shard.size, shard.sha256) for file, shard in shards.items()}
        record = manifest.finish(record, stage, known, time.monotonic() - began)
        (stage / manifest.FILE).write_text(manifest.to_json(record), encoding="utf-8")
        return record


def write_index(plan: MergePlan, stage: Path) -> None:
    """The index of several shards, as transformers reads it."""
    if [shard.file for shard in plan.shards] == [SINGLE]:
        return
    tensors = {tensor.name: (shard.file, tensor) for shard in plan.shards for tensor in shard.tensors}
    index = {
        "metadata": {
            "total_size": sum(tensor.nbytes for _, tensor in tensors.values()),
            "total_parameters": sum(math.prod(tensor.shape) for _, tensor in tensors.values()),
        },
        "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
    }
    (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
