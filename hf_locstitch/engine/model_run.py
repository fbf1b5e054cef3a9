"""Runs that end in a model: a merge of finetunes, or a stitch of localized checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.checkpoints.byte_ranges import Pieces
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.side_files import copy_side_files
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.engine.inputs import Inputs, OpenInputs
from hf_locstitch.engine.record import check_pins
from hf_locstitch.engine.run import Run, localize
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.engine.work_dir import ShardRecord
from hf_locstitch.localize.localized_masks import GivenMask, LocalizedMask, MergedMask
from hf_locstitch.plan.division import own_pieces, part_of, rounds
from hf_locstitch.plan.layout import OutputShard, index_name
from hf_locstitch.plan.plans import MergePlan, ModelPlan, StitchPlan
from hf_locstitch.runtime.files import sync_file, write_text
from hf_locstitch.stitch.per_tensor import Weights
from hf_locstitch.stitch.view import StitchView

if TYPE_CHECKING:
    from hf_locstitch.stitch.fitted_values import FittedValues

AnyModelPlan = TypeVar("AnyModelPlan", bound=ModelPlan)


class ModelRun(Run[AnyModelPlan]):
    def view(
        self,
        readers: Mapping[str, CheckpointReader],
        masks: Mapping[str, MaskSource],
        fitted: FittedValues | None = None,
    ) -> StitchView:
        """The view of the open inputs that shards are written from."""
        plan = self.plan
        return StitchView(
            method=plan.recipe.method.in_order([list(plan.finetuned).index(name) for name in plan.order]),
            scale=plan.recipe.scale,
            base=readers["base"],
            unmasked=readers["base" if plan.unmasked_from is plan.base else str(plan.recipe.rest_from)],
            finetuned=[] if plan.masked else [readers[name] for name in plan.order],
            masks=[masks[name] for name in plan.order] if plan.masked else [],
            dtypes={tensor.name: tensor.dtype for shard in plan.shards for tensor in shard.tensors},
            tensors=plan.mask_tensors,
            chunk=self.settings.chunk,
            weights=Weights([plan.weights.get(name, 1.0) for name in plan.order]),
            allow_non_finite=plan.recipe.allow_non_finite,
            fitted=fitted,
        )

    def read_later(self) -> Pieces:
        return self.plan.kept_for(part_of(self._unfinished(), self.own))

    def _unfinished(self) -> list[OutputShard]:
        return [shard for shard in self.plan.shards if self._finished[shard.file] is None]

    @cached_property
    def _finished(self) -> dict[str, ShardRecord | None]:
        """Records of the output shards that an earlier run finished."""
        finished = {shard.file: self.work.finished(shard.file) for shard in self.plan.shards} if self.first else {}
        return self.processes.gather(finished)[0]

    def write_shards(
        self, inputs: Inputs, masks: Mapping[str, MaskSource], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        plan = self.plan
        hashed: dict[str, Future[ShardRecord]] = {}
        noted: list[Future[None]] = []
        todo = rounds(self._unfinished(), self.owned)
        with (
            self.progress.bar("merging", sum(map(self._own_bytes, plan.shards))) as advance,
            ThreadPoolExecutor(1) as journal,
            inputs.opened(self._written_from([shard for together in todo for shard in together])) as opened,
        ):
            view = self.view(opened.readers, masks, self.fitted)
            if (vocabulary := plan.vocabulary) is not None and not vocabulary.localized:
                view = replace(view, unmasked=vocabulary.alignment.reader("base", opened.readers))
            order = [plan.order.index(name) for name in plan.finetuned]
            writer = ShardWriter(view, self.own, order, workers=self.settings.workers, advance=advance)
            advance(sum(self._own_bytes(shard) for shard in plan.shards if self._finished[shard.file] is not None))
            for shards in todo:
                self._await_room(hashed.values())
                for shard, overlap, sha256 in self._write_shards(writer, shards):
                    if self.first:
                        hashed[shard.file] = background.submit(self._finish_shard, shard, overlap, sha256)
                    noted.append(journal.submit(self._note, shard, hashed.get(shard.file), opened))
            self.processes.together(lambda: [future.result() for future in noted])
            done = {file: future.result() for file, future in hashed.items()}
        records = {**self._finished, **self.processes.gather(done)[0]}
        shards = {file: record for file, record in records.items() if record is not None}
        total = Overlap.none(len(plan.finetuned))
        for record in shards.values():
            total += Overlap(np.array(record.covered), np.array(record.pairs))
        return total, shards

    def _written_from(self, shards: Sequence[OutputShard]) -> Pieces:
        """What this process reads to write its parts of shards, in this order; every input that any process reads."""
        every = self.plan.written_from(self.plan.shards)
        return dict.fromkeys(every, ()) | dict(self.plan.written_from(part_of(shards, self.own)))

    def _own_bytes(self, shard: OutputShard) -> int:
        """Bytes of the shard that this process writes."""
        return sum(tensor.nbytes for tensor in shard.tensors if tensor.name in self.own)

    def _await_room(self, hashed: Iterable[Future[ShardRecord]]) -> None:
        """If shards are deleted once uploaded: at most one waits while the next is written."""
        if self.first and self.upload is not None and self.upload.discard:
            for future in hashed:
                future.result()
            self.upload.wait(1)

    def _write_shards(
        self, writer: ShardWriter, shards: Sequence[OutputShard]
    ) -> list[tuple[OutputShard, Overlap, str | None]]:
        """Each with how the masks overlap in it, and its SHA-256 if a single process writes it."""

        def lay_out() -> None:
            for shard in shards:
                self.work.forget(shard.file)
                SafetensorsWriter(self.work.stage / shard.file, shard.tensors, shard.metadata).close()

        self.processes.on_first(lay_out)
        if self.processes.count == 1:
            return [(shard, *writer.write(shard, self.work.stage / shard.file)) for shard in shards]
        parts = self.processes.together(
            lambda: [writer.write_part(shard, self.work.stage / shard.file) for shard in shards]
        )
        add_up = self.processes.sum
        overlaps = [Overlap(add_up(part.covered), add_up(part.pairs)) for part in parts]
        return [(shard, overlap, None) for shard, overlap in zip(shards, overlaps, strict=True)]

    def _finish_shard(self, shard: OutputShard, overlap: Overlap, sha256: str | None) -> ShardRecord:
        """Start uploading a written shard once it is on the disk; it is invisible before the commit."""
        path = self.work.stage / shard.file
        sync_file(path)
        record = ShardRecord(
            sha256 or file_sha256(path),
            path.stat().st_size,
            overlap.covered.tolist(),
            overlap.pairs.tolist(),
            self.processes.count,
        )
        if self.upload is not None:
            self.upload.add(self.work.stage, shard.file, record.sha256)
        return record

    def _note(self, shard: OutputShard, hashed: Future[ShardRecord] | None, opened: OpenInputs) -> None:
        """Journal a shard once all files that this process read for it are verified. hashed: in the first process."""
        record = hashed.result() if hashed is not None else None
        opened.verify(tensor.name for tensor in shard.tensors if tensor.name in self.own)
        if record is not None:
            self.work.record(shard.file, record)
        else:
            self.work.note_part(shard.file, self.processes.rank)

    def expect_side_files(self) -> None:
        self.plan.files.source.expect(self.plan.side_files.copied)

    def write_side_files(self) -> None:
        plan, stage = self.plan, self.work.stage
        write_index(plan, stage)
        copy_side_files(plan.files, plan.side_files, stage, plan.recipe.dtype)


class MergeRun(ModelRun[MergePlan]):
    def find_masks(self, inputs: Inputs) -> Mapping[str, MaskSource]:
        return localize(self, inputs) if self.plan.masked else {}


class StitchRun(ModelRun[StitchPlan]):
    def find_masks(self, inputs: Inputs) -> Mapping[str, MaskSource]:
        """Those that the localized checkpoints hold, with their values, or the merges that finetunes were part of."""
        check_pins(self.plan, self.files)  # before anything is made of them
        plan, own = self.plan, [info.name for info in self.plan.mask_tensors if info.name in self.own]
        opened_masks = self.processes.together(
            lambda: {name: one.open_mask() for name, one in plan.merged_inputs.items()}
        )
        found: dict[str, GivenMask] = {}
        with self._opened(inputs) as opened, ExitStack() as held:
            for name, checkpoint in plan.localized_inputs.items():
                found[name] = LocalizedMask(checkpoint, plan.mask_tensors, self._spill_of(name), self.settings.chunk)
                held.callback(found[name].close)
            for name, mask in opened_masks.items():
                reader = opened.readers[name]
                found[name] = MergedMask(mask, reader, plan.mask_tensors, self._spill_of(name), self.settings.chunk)
                held.callback(found[name].close)
            nbytes = sum(mask.nbytes(name) for mask in found.values() for name in own)
            with self.progress.bar("reading", nbytes) as advance:
                for mask in found.values():
                    self.processes.together(lambda mask=mask: mask.read(self.own, self.settings.workers, advance))
            self.processes.together(opened.verify)
            held.pop_all()  # all went well: who gets them closes them
        return {name: found[name] for name in plan.finetuned}

    def _opened(self, inputs: Inputs) -> AbstractContextManager[OpenInputs]:
        """The finetunes whose masks a merge holds."""
        scanned = own_pieces(self.plan.scanned, self.own)
        return inputs.opened(scanned) if scanned else nullcontext(OpenInputs({}))

    def _spill_of(self, name: str) -> Path:
        return self.work.spill / f"{name}.{self.processes.rank}-of-{self.processes.count}"


def write_index(plan: ModelPlan, stage: Path) -> None:
    """The index of several shards, as transformers reads it."""
    file = index_name(plan.shards)
    if file is None:
        return
    tensors = {tensor.name: (shard.file, tensor) for shard in plan.shards for tensor in shard.tensors}
    index = {
        "metadata": {
            "total_size": sum(tensor.nbytes for _, tensor in tensors.values()),
            "total_parameters": sum(math.prod(tensor.shape) for _, tensor in tensors.values()),
        },
        "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
    }
    write_text(stage / file, json.dumps(index, indent=2) + "\n")
