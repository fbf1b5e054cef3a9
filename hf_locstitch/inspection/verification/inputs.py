"""The checkpoints that a merge was made from, as its manifest names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hf_locstitch.adapters.opening import laid_over, local_reader
from hf_locstitch.artifacts.manifest import InputRecord, Manifest
from hf_locstitch.checkpoints.byte_ranges import files_of
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.opening import open_checkpoint, refuse_adapter
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import LocstitchError, RecipeError
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.runtime.human import counted


@dataclass(frozen=True)
class InputRef:
    """Where to look for an input. asked: named by the user, not by the manifest."""

    name: str
    ref: str
    asked: bool


def input_refs(record: Manifest, base: str | None, finetuned: Sequence[str] | None) -> list[InputRef]:
    """One for each input. Raises RecipeError unless there are as many refs as finetunes."""
    names = [entry.name for entry in record.inputs if entry.role != "base"]
    if finetuned is not None and len(finetuned) != len(names):
        raise RecipeError(
            f"the merge was made from {counted(len(names), 'finetune')} ({', '.join(names)}): --ft expects "
            f"{len(names)}, got {len(finetuned)}. Name one REF for each, in this order."
        )
    asked = dict(zip(names, finetuned or (), strict=False))
    if base is not None:
        asked |= {entry.name: base for entry in record.inputs if entry.role == "base"}
    return [InputRef(entry.name, asked.get(entry.name, entry.ref), entry.name in asked) for entry in record.inputs]


def open_inputs(refs: Sequence[InputRef]) -> tuple[dict[str, Checkpoint], dict[str, str]]:
    """The inputs that can be opened, and why the others cannot. Raises CheckpointError for one that the user named."""
    opened: dict[str, Checkpoint] = {}
    reasons: dict[str, str] = {}
    for ref in refs:
        try:
            opened[ref.name] = open_checkpoint(parse_ref(ref.ref))
        except LocstitchError as error:
            if ref.asked:
                raise
            reasons[ref.name] = f"{ref.name}: {error}"
    if "base" not in opened:
        return opened, reasons
    refuse_adapter(opened["base"], "a base must be a whole model")
    return {**laid_over(opened["base"], opened)}, reasons


def check_hashes(entry: InputRecord, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The shards are those of the merge. The Hub's own hashes are trusted: downloads are checked against them."""
    source = checkpoint.source
    digests = {file: source.files[file].sha256 or source.sha256(file) for file in checkpoint.files}
    for file in sorted(entry.files.keys() | digests.keys()):
        got, due = digests.get(file, "absent"), entry.files.get(file, "absent")
        if got != due:
            where = f"{entry.name} ({checkpoint.label}/{file})"
            yield Finding("inputs", where, "sha256", got, f"{due} as in locstitch.json")


def fetch_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> CheckpointReader:
    """The checkpoint, with only those shards fetched and opened that hold the tensors `names`; an adapter, whole."""
    if checkpoint.layout is not checkpoint:
        return local_reader(checkpoint, {file: checkpoint.source.fetch(file) for file in checkpoint.files})
    needed = files_of(checkpoint, names)
    shards = tuple(shard for shard in checkpoint.shards if shard.file in needed)
    return MappedCheckpoint(
        replace(checkpoint, shards=shards), {shard.file: checkpoint.source.fetch(shard.file) for shard in shards}
    )
