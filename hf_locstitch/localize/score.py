"""From a finetune and its localization set to a file of scores that the selection reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.data.sets import OpenSet
from hf_locstitch.data.task import Task
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.open_subject import open_subject
from hf_locstitch.localize.passes import State
from hf_locstitch.localize.ranking import Keys, kth_largest, pieces, sortable
from hf_locstitch.localize.saliency import Saliency
from hf_locstitch.localize.score_file import LARGEST, ScoreFile, write_scores
from hf_locstitch.localize.subject import Subject

Pieces = Iterator[tuple[str, int, torch.Tensor]]


def score(
    how: Mask | Saliency,
    name: str,
    base: CheckpointReader,
    finetuned: CheckpointReader,
    tensors: Sequence[TensorInfo],
    data: OpenSet,
    room: Room,
) -> ScoreFile:
    """The scores of one finetune, from an earlier process if it left them. Every process calls it.

    name: of the finetune. tensors: the localized ones, as the base holds them. Raises RequestError or WorkError.
    """
    path = room.folder / f"{name}.scores"
    if not any(room.processes.gather(path.exists())):
        subject, task = room.processes.together(
            lambda: open_subject(how, f"{name}.{room.processes.rank}", base, finetuned, tensors, data, room.folder)
        )
        state, losses, ones = _scores(how, subject, task, room)
        found = _pieces(subject, state)
        if isinstance(how, Mask):
            k = how.kept([info.numel for info in tensors]) if ones is None else ones
            found = ranked(subject, state, finetuned, base, k)

        def write() -> None:
            write_scores(path, tensors, found, ones, losses)

        if how.sharded:  # all gather what the first one writes
            room.processes.together(write if room.processes.first else lambda: deque(found, maxlen=0))
        else:
            room.processes.on_first(write)
    return ScoreFile(path)


def _scores(how: Mask | Saliency, subject: Subject, task: Task, room: Room) -> tuple[State, list[float], int | None]:
    """The state that ranks, the losses on the way, and the number of ones where the state decides it."""
    if isinstance(how, Saliency):
        return saliency_scores(how, subject, task, room), [], None
    state, losses = learn_mask(how, subject, task, room)
    if how.density is not None:
        return state, losses, None
    return state, losses, sum(int((piece > 0).sum()) for _, _, piece in _pieces(subject, state))


def _pieces(subject: Subject, state: State) -> Pieces:
    """The state under the names on disk. Raises NonFiniteError."""
    for name, tensor in subject.to_disk(state.__getitem__):
        first = 0
        for piece in pieces(tensor):
            if not torch.isfinite(piece).all():
                raise NonFiniteError(
                    f"the scores hold NaN or infinity in {name}: a weight or a gradient there does. "
                    "Leave the tensor out with --exclude, or check the checkpoints."
                )
            yield name, first, piece.detach().float().cpu()
            first += len(piece)


def ranked(subject: Subject, state: State, finetuned: CheckpointReader, base: CheckpointReader, k: int) -> Pieces:
    """Scores whose k largest are those of the state, ties by |τ|, then evenly.

    What is above the k-th largest of the state gets the largest number; what is equal to it gets |τ|'s bits and one
    more, what is below gets 0. So one float32 ranks by two keys, exactly.
    """

    def keys() -> Iterator[Keys]:
        return (sortable(piece) for _, _, piece in _pieces(subject, state))

    threshold = kth_largest(keys, k)
    for name, first, piece in _pieces(subject, state):
        key = sortable(piece)
        theirs = finetuned.flat(name, first, len(piece)).float()
        magnitude = (theirs - base.flat(name, first, len(piece)).float()).abs().numpy().view(np.int32)
        bits = np.where(key > threshold.bits, LARGEST, np.minimum(magnitude, LARGEST - 2) + 1)
        bits = np.where(key < threshold.bits, 0, bits).astype(np.int32)
        yield name, first, torch.from_numpy(bits.view(np.float32))
