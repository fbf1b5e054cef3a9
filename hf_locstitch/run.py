"""Carries a plan out: fetch, localize, stitch, write. OUT appears whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch import manifest
from hf_locstitch.card import write_card
from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from hf_locstitch.checkpoints.mapped import TORCH_DTYPE, MappedCheckpoint
from hf_locstitch.checkpoints.side_files import copy_side_files
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.chunks import CHUNK, Chunk, chunks_of, for_each, worker_count
from hf_locstitch.errors import OutputError
from hf_locstitch.localize.scan import Scan, all_finite, raise_non_finite
from hf_locstitch.localize.selection import Selection
from hf_locstitch.masks import mask_metadata, write_mask
from hf_locstitch.plan import MergePlan, OutputShard, PlannedTensor, human
from hf_locstitch.progress import Progress
from hf_locstitch.select import is_buffer
from hf_locstitch.stitch import coverage, overlaps, stitch


@dataclass(frozen=True)
class Settings:
    """How, not what: no setting changes a byte of the output. chunk: elements. workers: threads."""

    chunk: int = CHUNK
    workers: int = field(default_factory=worker_count)


@dataclass
class Overlap:
    """covered: by how many masks each coordinate is covered [models + 1]. pairs: covered by both [models, models]."""

    covered: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]


def check_out(out: Path) -> None:
    """Raises OutputError unless `out` can become the output folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; nothing is overwritten. Name another --out.")


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


@contextmanager
def staging(out: Path) -> Iterator[tuple[Path, Path]]:
    """A sibling of `out` that becomes it, and a folder for temporary files. Both go if the work fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        stage, spill = work / "out", work / "spill"
        stage.mkdir()
        spill.mkdir()
        yield stage, spill
        stage.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(plan: MergePlan, out: Path, progress: Progress, settings: Settings) -> manifest.Manifest:
    """Merge into the folder `out`. Raises OutputError, NonFiniteError, DownloadError or IntegrityError."""
    torch.set_num_threads(1)  # our own threads share out the chunks; torch's would fight them
    began = time.monotonic()
    with staging(out) as (stage, spill), ThreadPoolExecutor(1) as background:
        inputs = fetch(plan, progress)
        hashes = [background.submit(hash_files, checkpoint) for checkpoint in plan.inputs.values()]
        try:
            selections = localize(plan, inputs, spill, progress, settings)
            write_masks(plan, selections, stage, spill, settings)
            overlap = write_shards(plan, inputs, selections, stage, progress, settings)
            files = {name: future.result() for name, future in zip(plan.inputs, hashes, strict=True)}
        finally:
            _cancel(hashes)
        write_index(plan, stage)
        copy_side_files(plan.files.source, stage, plan.recipe.dtype)
        record = manifest.make_manifest(plan, files, overlap.covered, overlap.pairs)
        manifest.check_pins(plan, files)
        (stage / "locstitch.yaml").write_text(manifest.pinned_recipe(plan, files), encoding="utf-8")
        write_card(plan, record, stage / "README.md")
        record = manifest.finish(record, stage, time.monotonic() - began)
        (stage / manifest.FILE).write_text(manifest.to_json(record), encoding="utf-8")
    return record


def _cancel(futures: Sequence[Future]) -> None:  # type: ignore[type-arg]
    for future in futures:
        future.cancel()


def fetch(plan: MergePlan, progress: Progress) -> dict[str, MappedCheckpoint]:
    """Every input's shards on this machine, opened. Keys as plan.inputs."""
    total = sum(shard.size for checkpoint in plan.inputs.values() for shard in checkpoint.shards)
    paths: dict[str, dict[str, Path]] = {}
    with progress.bar("downloading", total) as advance:
        for name, checkpoint in plan.inputs.items():
            paths[name] = {shard.file: checkpoint.source.fetch(shard.file, advance) for shard in checkpoint.shards}
    return {name: MappedCheckpoint(checkpoint, paths[name]) for name, checkpoint in plan.inputs.items()}


def hash_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each shard."""
    return {shard.file: checkpoint.source.sha256(shard.file) for shard in checkpoint.shards}


def localize(
    plan: MergePlan,
    inputs: Mapping[str, MappedCheckpoint],
    spill: Path,
    progress: Progress,
    settings: Settings,
) -> dict[str, Selection]:
    """The mask of each finetune."""
    tensors = plan.localized
    finetuned = {name: inputs[name] for name in plan.finetuned}
    nbytes = sum(checkpoint.info(tensor.name).nbytes for checkpoint in plan.finetuned.values() for tensor in tensors)
    with progress.bar("localizing", nbytes) as advance:
        return Scan(
            inputs["base"],
            finetuned,
            tensors,
            plan.recipe.localizer.groups([tensor.numel for tensor in tensors]),
            spill,
            chunk=settings.chunk,
            workers=settings.workers,
            allow_non_finite=plan.recipe.allow_non_finite,
            advance=advance,
        ).run()


def write_masks(
    plan: MergePlan, selections: Mapping[str, Selection], stage: Path, spill: Path, settings: Settings
) -> None:
    (stage / "masks").mkdir()
    for name, selection in selections.items():
        path = stage / "masks" / f"{name}.safetensors"
        metadata = mask_metadata(plan, name)
        write_mask(path, plan.localized, selection, metadata, spill / f"{name}.mask", settings.workers)


def write_shards(
    plan: MergePlan,
    inputs: Mapping[str, MappedCheckpoint],
    selections: Mapping[str, Selection],
    stage: Path,
    progress: Progress,
    settings: Settings,
) -> Overlap:
    """Stitch, shard by shard. Returns how the masks overlap."""
    with progress.bar("stitching", plan.cost.write) as advance:
        stitcher = Stitcher(plan, inputs, selections, settings, advance)
        for shard in plan.shards:
            stitcher.write(shard, stage / shard.file)
    return stitcher.overlap


class Stitcher:
    """Writes the tensors of the plan, chunk by chunk in several threads."""

    def __init__(
        self,
        plan: MergePlan,
        inputs: Mapping[str, MappedCheckpoint],
        selections: Mapping[str, Selection],
        settings: Settings,
        advance: Callable[[int], object],
    ) -> None:
        self.plan, self.settings, self.advance = plan, settings, advance
        self.base = inputs["base"]
        self.rest = next(reader for reader in inputs.values() if reader.checkpoint is plan.rest)
        # The mean adds up in an order of the models' own, whatever the order in which they were given.
        self._order = sorted(selections, key=lambda name: plan.finetuned[name].source.pinned)
        self._selections = selections
        tensors = plan.localized
        self._chunks: dict[str, list[Chunk]] = {info.name: [] for info in tensors}
        for chunk in chunks_of([info.numel for info in tensors], settings.chunk):
            self._chunks[tensors[chunk.tensor].name].append(chunk)
        models = len(selections)
        self.overlap = Overlap(np.zeros(models + 1, np.int64), np.zeros((models, models), np.int64))
        self._lock = threading.Lock()

    def write(self, shard: OutputShard, path: Path) -> None:
        entries = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors]
        with SafetensorsWriter(path, entries, shard.metadata) as writer:
            for_each(lambda job: job(writer), self._jobs(shard), self.settings.workers)

    def _jobs(self, shard: OutputShard) -> Iterator[Callable[[SafetensorsWriter], None]]:
        for tensor in shard.tensors:
            if tensor.localized:
                for chunk in self._chunks[tensor.name]:
                    yield partial(self._stitch, tensor, chunk)
            else:
                numel = self.rest.checkpoint.info(tensor.name).numel
                for chunk in chunks_of([numel], self.settings.chunk):
                    yield partial(self._copy, tensor, chunk)

    def _stitch(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        kept = {name: selection.kept(chunk) for name, selection in self._selections.items()}
        base = self.base.flat(tensor.name, chunk.first, chunk.count)
        times = coverage(chunk.count, list(kept.values()))
        merged = stitch(
            base,
            [kept[name] for name in self._order],
            times,
            scale=self.plan.recipe.scale,
            dtype=TORCH_DTYPE[tensor.dtype],
        )
        covered, pairs = overlaps(times, list(kept.values()))
        with self._lock:
            self.overlap.covered += covered
            self.overlap.pairs += pairs
        self._put(writer, tensor, chunk, merged)
        self.base.release(tensor.name, chunk.first, chunk.count)

    def _copy(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        """A piece of a tensor that is not localized."""
        info = self.rest.checkpoint.info(tensor.name)
        if not info.floating:
            item = info.nbytes // info.numel
            first = chunk.first * item
            content = self.rest.raw(tensor.name, first, first + chunk.count * item)
            writer.write(tensor.name, content, first)
            self.advance(len(content))
            return
        values = self.rest.flat(tensor.name, chunk.first, chunk.count)
        checked = not self.plan.recipe.allow_non_finite and not is_buffer(info)
        if checked and not all_finite(values):
            whole = self.rest.flat(tensor.name, 0, info.numel)
            raise_non_finite(self.rest, tensor.name, int((~torch.isfinite(whole)).sum()), info.numel)
        self._put(writer, tensor, chunk, values.to(TORCH_DTYPE[tensor.dtype]))
        self.rest.release(tensor.name, chunk.first, chunk.count)

    def _put(self, writer: SafetensorsWriter, tensor: PlannedTensor, chunk: Chunk, values: torch.Tensor) -> None:
        content = values.view(torch.uint8).numpy().data
        writer.write(tensor.name, content, chunk.first * values.element_size())
        self.advance(content.nbytes)


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
