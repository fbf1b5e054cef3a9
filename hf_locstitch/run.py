"""Carries a plan out: fetch, localize, merge, write. OUT appears whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hf_locstitch import manifest
from hf_locstitch.card import write_card
from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.side_files import copy_side_files
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.chunks import CHUNK, worker_count
from hf_locstitch.errors import OutputError
from hf_locstitch.localize.scan import Scan
from hf_locstitch.localize.selection import Selection
from hf_locstitch.masks import assemble_mask, encode_masks, mask_metadata
from hf_locstitch.merger import Merger, Overlap
from hf_locstitch.plan import MergePlan, OutputShard, human
from hf_locstitch.processes import Processes, divide
from hf_locstitch.progress import Progress
from hf_locstitch.workplace import ShardRecord, Workplace, fingerprint, workplace


@dataclass(frozen=True)
class Settings:
    """How, not what: no setting changes a byte of the output. chunk: elements. workers: threads."""

    chunk: int = CHUNK
    workers: int = field(default_factory=worker_count)


def check_out(out: Path, plan: MergePlan) -> manifest.Manifest | None:
    """The record of this very merge if `out` holds it complete. Raises OutputError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = manifest.read_manifest(out)
    if record is None or record.fingerprint != fingerprint(plan) or not manifest.is_intact(record, out):
        raise OutputError(f"{out} exists and is not an empty folder; nothing is overwritten. Name another --out.")
    return record


def check_disk(folder: Path, plan: MergePlan) -> None:
    """Raises OutputError if the output and its temporary files will not fit beside `folder`."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < plan.cost.disk:
        raise OutputError(
            f"{folder} needs up to {human(plan.cost.disk)} of disk, of which {human(free)} are free. "
            "Free some, or name an --out elsewhere."
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.absolute().parent)


def run(
    plan: MergePlan, out: Path, progress: Progress, settings: Settings, processes: Processes | None = None
) -> manifest.Manifest:
    """Merge into the folder `out`. Raises RequestError, or WorkError after which the same call goes on."""
    torch.set_num_threads(1)  # our own threads share out the chunks; torch's would fight them
    processes = processes or Processes()
    with workplace(plan, out, processes) as place:
        return Run(plan, place, processes, progress, settings).run()


class Run:
    """One merge in one process. Every process makes the same calls in the same order."""

    def __init__(
        self, plan: MergePlan, place: Workplace, processes: Processes, progress: Progress, settings: Settings
    ) -> None:
        self.plan, self.place, self.processes = plan, place, processes
        self.progress = progress if processes.first else Progress(False)
        self.settings = settings
        tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
        owners = divide([tensor.nbytes for tensor in tensors], processes.count)
        self.own = {t.name for t, owner in zip(tensors, owners, strict=True) if owner == processes.rank}

    def run(self) -> manifest.Manifest:
        began = time.monotonic()
        inputs = self.processes.together(self.fetch)
        with ThreadPoolExecutor(1) as background:
            hashes = [background.submit(self._hash, name, file) for name, file in self._hash_jobs()]
            try:
                selections = self.localize(inputs) if self.plan.masked else {}
                self.write_masks(selections)
                overlap, outputs = self.write_shards(inputs, selections, background)
                files = self._gather_hashes(hashes)
            finally:
                for future in hashes:
                    future.cancel()
        records: list[manifest.Manifest] = []
        self.processes.on_first(lambda: records.append(self.finish(files, overlap, outputs, began)))
        return self.processes.gather(records[0] if records else None)[0]  # type: ignore[return-value]

    def fetch(self) -> dict[str, MappedCheckpoint]:
        """Every input's shards on this machine, opened. Keys as plan.inputs."""
        inputs = self.plan.inputs
        paths: dict[str, dict[str, Path]] = {}
        with self.progress.bar("fetching", sum(s.size for c in inputs.values() for s in c.shards)) as advance:
            for name, checkpoint in inputs.items():
                paths[name] = {s.file: checkpoint.source.fetch(s.file, advance) for s in checkpoint.shards}
        return {name: MappedCheckpoint(checkpoint, paths[name]) for name, checkpoint in inputs.items()}

    def _hash_jobs(self) -> list[tuple[str, str]]:
        """The shards of the inputs that this process hashes."""
        jobs = [(name, shard.file) for name, checkpoint in self.plan.inputs.items() for shard in checkpoint.shards]
        return jobs[self.processes.rank :: self.processes.count]

    def _hash(self, name: str, file: str) -> tuple[str, str, str]:
        return name, file, self.plan.inputs[name].source.sha256(file)

    def _gather_hashes(self, hashes: list[Future[tuple[str, str, str]]]) -> dict[str, dict[str, str]]:
        """SHA-256 of every shard of every input."""
        own = self.processes.together(lambda: [future.result() for future in hashes])
        files: dict[str, dict[str, str]] = {name: {} for name in self.plan.inputs}
        for results in self.processes.gather(own):
            for name, file, digest in results:
                files[name][file] = digest
        return files

    def localize(self, inputs: Mapping[str, MappedCheckpoint]) -> dict[str, Selection]:
        """The mask of each finetune."""
        plan = self.plan
        tensors = plan.localized
        finetuned = {name: inputs[name] for name in plan.finetuned}
        own = [tensor for tensor in tensors if tensor.name in self.own]
        nbytes = sum(checkpoint.info(tensor.name).nbytes for checkpoint in plan.finetuned.values() for tensor in own)
        with self.progress.bar("localizing", nbytes) as advance:
            return Scan(
                inputs["base"],
                finetuned,
                tensors,
                plan.groups,
                self.place.spill,
                own=self.own,
                processes=self.processes,
                chunk=self.settings.chunk,
                workers=self.settings.workers,
                allow_non_finite=plan.recipe.allow_non_finite,
                advance=advance,
            ).run()

    def write_masks(self, selections: Mapping[str, Selection]) -> None:
        for name, selection in selections.items():
            parts = self.place.spill / f"{name}.mask-{self.processes.rank}"
            encode = self.processes.together(
                lambda selection=selection, parts=parts: encode_masks(selection, self.own, parts, self.settings.workers)
            )
            places = self.processes.gather((parts, encode))
            self.processes.on_first(lambda name=name, places=places: self._assemble(name, places))

    def _assemble(self, name: str, places: list[tuple[Path, dict[str, tuple[int, int]]]]) -> None:
        (self.place.stage / "masks").mkdir(exist_ok=True)
        path = self.place.stage / "masks" / f"{name}.safetensors"
        assemble_mask(path, self.plan.localized, places, mask_metadata(self.plan, name))

    def write_shards(
        self,
        inputs: Mapping[str, MappedCheckpoint],
        selections: Mapping[str, Selection],
        background: ThreadPoolExecutor,
    ) -> tuple[Overlap, dict[str, str]]:
        """The output's shards. Returns how the masks overlap, and each shard's SHA-256."""
        before = {shard.file: self.place.finished(shard.file) for shard in self.plan.shards} if self._first else {}
        before = self.processes.gather(before)[0]
        hashes: dict[str, Future[ShardRecord]] = {}
        with self.progress.bar("merging", self.plan.cost.write) as advance:
            merger = Merger(
                self.plan,
                inputs,
                selections,
                self.own,
                chunk=self.settings.chunk,
                workers=self.settings.workers,
                advance=advance,
            )
            for shard in self.plan.shards:
                if before[shard.file] is None:
                    overlap = self._write_shard(merger, shard)
                    if self._first:
                        hashes[shard.file] = background.submit(self._record, shard.file, overlap)
                else:
                    advance(shard.nbytes)
        done = self.processes.together(lambda: {file: future.result() for file, future in hashes.items()})
        records = {file: record for file, record in {**before, **self.processes.gather(done)[0]}.items() if record}
        total = Overlap.none(len(self.plan.finetuned))
        for record in records.values():
            total += Overlap(np.array(record.covered), np.array(record.pairs))
        return total, {file: record.sha256 for file, record in records.items()}

    def _write_shard(self, merger: Merger, shard: OutputShard) -> Overlap:
        path = self.place.stage / shard.file
        self.processes.on_first(lambda: SafetensorsWriter(path, shard.entries, shard.metadata).close())
        own = self.processes.together(lambda: merger.write(shard, path))
        return Overlap(self.processes.sum(own.covered), self.processes.sum(own.pairs))

    def _record(self, file: str, overlap: Overlap) -> ShardRecord:
        record = ShardRecord(file_sha256(self.place.stage / file), overlap.covered.tolist(), overlap.pairs.tolist())
        self.place.record(file, record)
        return record

    @property
    def _first(self) -> bool:
        return self.processes.first

    def finish(
        self, files: manifest.FileHashes, overlap: Overlap, outputs: Mapping[str, str], began: float
    ) -> manifest.Manifest:
        """Everything beside weights and masks."""
        plan, stage = self.plan, self.place.stage
        manifest.check_pins(plan, files)
        write_index(plan, stage)
        copy_side_files(plan.files.source, stage, plan.recipe.dtype)
        record = manifest.make_manifest(plan, files, overlap, fingerprint(plan))
        (stage / manifest.RECIPE_FILE).write_text(manifest.pinned_recipe(plan, files), encoding="utf-8")
        write_card(plan, record, stage / "README.md")
        record = manifest.finish(record, stage, outputs, time.monotonic() - began)
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
