"""Fitted values on the disk while a merge is under way: those under the masks, as they will be written, or whole
tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_locstitch.checkpoints.reader import TORCH_DTYPE, CheckpointReader
from hf_locstitch.checkpoints.source import file_sha256

INDEX = "index.json"


class RefittedWriter:
    """folder: is emptied. A tensor is written once; `finish` makes the whole readable."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._tensors: dict[str, dict[str, Any]] = {}

    def write(self, name: str, dtype: str, pieces: Sequence[torch.Tensor]) -> None:
        """pieces: the values of each chunk in turn, in the dtype, as named on disk."""
        file = f"{len(self._tensors)}.bin"
        with (self._folder / file).open("wb") as handle:
            for piece in pieces:
                handle.write(piece.contiguous().view(torch.uint8).numpy().data)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()
        digest = file_sha256(self._folder / file)
        self._tensors[name] = {"file": file, "dtype": dtype, "starts": starts, "sha256": digest}

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def finish(self, heading: str) -> None:
        """heading: what these values belong to."""
        new = self._folder / f"{INDEX}.new"
        new.write_text(json.dumps({"heading": heading, "tensors": self._tensors}))
        new.replace(self._folder / INDEX)


class Refitted:
    """What a RefittedWriter wrote. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / INDEX).read_text())
        self.heading: str = fields["heading"]
        self._folder, self._tensors = folder, fields["tensors"]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def intact(self) -> bool:
        """Whether every file holds what was written."""
        return all(
            (self._folder / entry["file"]).is_file() and file_sha256(self._folder / entry["file"]) == entry["sha256"]
            for entry in self._tensors.values()
        )

    def chunk(self, name: str, number: int) -> torch.Tensor:
        """The values under the masks in a tensor's chunk, by its number in the tensor."""
        first, last = self._tensors[name]["starts"][number : number + 2]
        return self.flat(name, first, last - first)

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        """Of all that was written of a tensor, in the order of its chunks, the values first … first + count."""
        entry = self._tensors[name]
        dtype = TORCH_DTYPE[entry["dtype"]]
        if count == 0:
            return torch.empty(0, dtype=dtype)
        with (self._folder / entry["file"]).open("rb") as handle:
            content = os.pread(handle.fileno(), count * dtype.itemsize, first * dtype.itemsize)
        return torch.frombuffer(bytearray(content), dtype=dtype)


class StandIn(CheckpointReader):
    """A checkpoint some of whose tensors, whole, are fitted values instead."""

    def __init__(self, reader: CheckpointReader, fitted: Refitted) -> None:
        super().__init__(reader.checkpoint, {})
        self._reader, self._fitted = reader, fitted

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        return (self._fitted if name in self._fitted else self._reader).flat(name, first, count)

    def raw(self, name: str, first: int, stop: int) -> memoryview:
        return self._reader.raw(name, first, stop)

    def release(self, name: str, first: int, count: int) -> None:
        self._reader.release(name, first, count)


def open_refitted(folder: Path, heading: str) -> Refitted | None:
    """What an earlier process finished under the same heading, if it is whole."""
    try:
        found = Refitted(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.heading == heading and found.intact() else None
