"""One non-negative float32 score for every localizable element of a finetune, under its name on disk, in a file.

Written whole or not at all and with its hash beside it, so that a killed run need not score again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.checkpoints.header import TensorInfo, TensorSpec
from hf_locstitch.checkpoints.mapped import MappedFile, read_header
from hf_locstitch.checkpoints.reader import read_values
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.runtime.files import replacing
from hf_locstitch.runtime.journal import read_record, write_record

LARGEST = 0x7F7FFFFF  # bits of the largest finite float32


class ScoreFile:
    """ones: how many elements the mask keeps, where the scores decide it; else None. losses: during learning.
    examples: how many the scores were learned from."""

    def __init__(self, path: Path) -> None:
        header = read_header(path, str(path))
        self._infos = {info.name: info for info in header.tensors}
        self._file = MappedFile(path)
        self.ones: int | None = json.loads(header.metadata["ones"])
        self.losses: list[float] = json.loads(header.metadata["losses"])
        self.examples: int = json.loads(header.metadata["examples"])

    def bits(self, name: str, first: int, count: int) -> npt.NDArray[np.int32]:
        """Scores of the elements first … first + count of a tensor, as their bits. Returns [count]."""
        return read_values(self._file, self._infos[name], first, count).view(np.int32)


def write_scores(
    path: Path,
    tensors: Sequence[TensorInfo],
    pieces: Iterable[tuple[str, int, torch.Tensor]],
    ones: int | None,
    losses: Sequence[float],
    examples: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> ScoreFile:
    """pieces: (tensor's name, first element, scores float32 [count]), covering every element once."""
    metadata = {"ones": json.dumps(ones), "losses": json.dumps(list(losses)), "examples": json.dumps(examples)}
    entries = [TensorSpec(info.name, "F32", info.shape, 4 * info.numel) for info in tensors]
    with replacing(path) as new, SafetensorsWriter(new, entries, metadata) as writer:
        with writer.hashing() as hashed:
            for name, first, scores in pieces:
                writer.write(name, scores.contiguous().view(torch.uint8).numpy().data, 4 * first)
                advance(len(scores))
        sha256 = hashed.result()
    write_record(_done(path), sha256)
    return ScoreFile(path)


def is_whole(path: Path) -> bool:
    """Whether the scores of an earlier process are there, as it wrote them."""
    return path.is_file() and read_record(_done(path)) == file_sha256(path)


def _done(path: Path) -> Path:
    return path.with_name(f"{path.name}.done")
