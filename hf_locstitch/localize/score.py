"""From a finetune and its localization set to a file of scores for the selection."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.tensors import pieces
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.candidates import differing, magnitude_scores
from hf_locstitch.localize.grafted_model import GraftedModel
from hf_locstitch.localize.kth_largest import Keys, kth_largest, sortable
from hf_locstitch.localize.learn import Room
from hf_locstitch.localize.open_grafted_model import open_grafted_model
from hf_locstitch.localize.score_file import LARGEST, ScoreFile, is_whole, write_scores
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.tasks.passes import State
from hf_locstitch.tasks.sets import OpenSet

Pieces = Iterator[tuple[str, int, torch.Tensor]]


def score(
    config: WithData,
    name: str,
    base: CheckpointReader,
    finetuned: CheckpointReader,
    tensors: Sequence[TensorInfo],
    data: OpenSet,
    room: Room,
) -> ScoreFile:
    """The scores of one finetune, from an earlier process if it left them. Every process calls this.

    name: of the finetune. tensors: the localized ones, as in the base. Raises RequestError or WorkError.
    """
    path = room.folder / f"{name}.scores"
    if not room.processes.gather(room.processes.first and is_whole(path))[0]:
        grafted, task = room.processes.together(
            lambda: open_grafted_model(
                config, f"{name}.{room.processes.rank}", base, finetuned, tensors, data, room.folder
            )
        )
        learned = config.learn(grafted, task, room)
        scored = _pieces(grafted, learned.state)
        if learned.ranks:
            k = config.kept([info.numel for info in tensors]) if learned.ones is None else learned.ones
            scored = ranked(grafted, learned.state, finetuned, base, k)

        def write() -> None:
            write_scores(path, tensors, scored, learned.ones, learned.losses, len(task.examples))

        if config.sharded:  # all processes gather what the first one writes
            room.processes.together(write if room.processes.first else lambda: deque(scored, maxlen=0))
        else:
            room.processes.on_first(write)
    return ScoreFile(path)


def _pieces(grafted: GraftedModel, state: State) -> Pieces:
    """The state under the names on disk. Raises NonFiniteError."""
    for name, tensor in grafted.to_disk(state.__getitem__):
        first = 0
        for piece in pieces(tensor):
            if not torch.isfinite(piece).all():
                raise NonFiniteError(
                    f"the scores of {name} contain NaN or infinity, because one of its weights or gradients does. "
                    "Exclude the tensor with --exclude, or check the checkpoints."
                )
            yield name, first, piece.detach().float().cpu()
            first += len(piece)


def ranked(grafted: GraftedModel, state: State, finetuned: CheckpointReader, base: CheckpointReader, k: int) -> Pieces:
    """Scores whose k largest are those of the state, ties by |τ|, then evenly, of what differs from the base.

    What is above the k-th largest of the state gets the largest number; what is equal to it gets |τ|'s bits and one
    more, what is below gets 0. So one float32 ranks by two keys, exactly.
    """

    def values(reader: CheckpointReader, name: str, first: int, piece: torch.Tensor) -> Values:
        return reader.values(name, first, len(piece))

    def key_of(name: str, first: int, piece: torch.Tensor) -> Keys:
        """0, below all, where nothing changed."""
        changed = differing(values(finetuned, name, first, piece), values(base, name, first, piece))
        return np.where(changed, sortable(piece), np.uint32(0))

    def keys() -> Iterator[Keys]:
        return (key_of(name, first, piece) for name, first, piece in _pieces(grafted, state))

    threshold = kth_largest(keys, k)
    for name, first, piece in _pieces(grafted, state):
        key = key_of(name, first, piece)
        size = magnitude_scores(values(finetuned, name, first, piece), values(base, name, first, piece))
        bits = np.where(key > threshold.bits, LARGEST, np.minimum(size, LARGEST - 2) + 1)
        bits = np.where(key < threshold.bits, 0, bits).astype(np.int32)
        yield name, first, torch.from_numpy(bits.view(np.float32))
