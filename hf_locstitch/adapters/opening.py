"""Checkpoints among which there may be adapters. Imports PEFT and torch only if there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import model_types
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.checkpoints.mapped import NOT_HASHED, MappedCheckpoint
from hf_locstitch.checkpoints.pairing import names_in_base, paired
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.rearranged import rearranged


def laid_over(base: Checkpoint, finetuned: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The finetunes under the base's names, with those that are adapters laid over the base. Raises CheckpointError."""
    return {name: _laid_over(base, checkpoint) for name, checkpoint in finetuned.items()}


def _laid_over(base: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    if not isinstance(checkpoint, AdapterCheckpoint):
        return _recut(base, paired(base, checkpoint), names_in_base(base, checkpoint))
    from hf_locstitch.adapters.fit import lay_over

    return lay_over(checkpoint, base)


def _recut(base: Checkpoint, other: Checkpoint, called: Mapping[str, str]) -> Checkpoint:
    """With experts one by one or as a stack, as the base has them; as it is if they agree, or nothing is known.

    called: what the base would call the tensors that it lacks, were they cut as its own.
    """
    lacking, free = base.tensors.keys() - other.tensors.keys(), other.tensors.keys() - base.tensors.keys()
    if not lacking or not free or not (types := model_types(base.config)):
        return other
    from hf_locstitch.tasks.fused_tensors import parts

    own = parts(types, {called[name] for name in free})
    return rearranged(base, other, parts(types, lacking), {name: own[called[name]] for name in free})


def local_reader(
    checkpoint: Checkpoint, paths: Mapping[str, Path], hashed: Mapping[str, FollowingHash] = NOT_HASHED
) -> CheckpointReader:
    """A reader of files on this machine. paths: where those are that the checkpoint's tensors lie in. hashed: what
    follows the reading of some, if it is not an adapter.
    """
    if not isinstance(checkpoint, AdapterCheckpoint):
        return MappedCheckpoint(checkpoint, paths, hashed)
    from hf_locstitch.adapters.reader import AdapterReader

    return AdapterReader(checkpoint, paths)
