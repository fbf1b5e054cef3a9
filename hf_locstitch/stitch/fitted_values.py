"""Fitted values on the disk while a merge is under way: those under the masks, as they will be written, or whole
tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.runtime.dtypes import DTYPE, Values
from hf_locstitch.runtime.journal import read_record, write_record
from hf_locstitch.runtime.processes import Processes

INDEX = "index.json"


class FittedWriter:
    """folder: is emptied. own: the tensors that this process writes, each once; `finish` makes the whole readable.

    Every process makes one, and finishes it.
    """

    def __init__(self, folder: Path, own: Collection[str], processes: Processes) -> None:
        def lay_out() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

        processes.on_first(lay_out)
        self._folder, self._own, self._processes = folder, own, processes
        self._tensors: dict[str, dict[str, Any]] = {}

    def writes(self, names: Sequence[str]) -> bool:
        """Whether any of these tensors is this process's."""
        return any(name in self._own for name in names)

    def write(self, name: str, dtype: str, pieces: Sequence[torch.Tensor]) -> None:
        """pieces: the values of each chunk in turn, in the dtype, as named on disk."""
        file = f"{self._processes.rank}.{len(self._tensors)}.bin"
        with (self._folder / file).open("wb") as handle:
            for piece in pieces:
                handle.write(piece.contiguous().view(torch.uint8).numpy().data)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()
        digest = file_sha256(self._folder / file)
        self._tensors[name] = {"file": file, "dtype": dtype, "starts": starts, "sha256": digest}

    @property
    def names(self) -> set[str]:
        """Of those that were written: by this process, and once it is finished by all."""
        return set(self._tensors)

    def finish(self, heading: str, **notes: Any) -> None:
        """heading: what these values belong to. notes: what else is to be known of them, as JSON has it."""
        self._tensors = {name: entry for told in self._processes.gather(self._tensors) for name, entry in told.items()}

        content = {"heading": heading, "tensors": self._tensors, "notes": notes}
        self._processes.on_first(lambda: write_record(self._folder / INDEX, content))


class FittedValues:
    """What RefittedWriters wrote. Safe to share between threads. index: what `finish` noted."""

    def __init__(self, folder: Path, index: Any) -> None:
        self.heading: str = index["heading"]
        self.notes: dict[str, Any] = index["notes"]
        self._folder, self._tensors = folder, index["tensors"]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def intact(self, own: Collection[str]) -> bool:
        """Whether the files of these tensors hold what was written."""
        return all(
            (self._folder / entry["file"]).is_file() and file_sha256(self._folder / entry["file"]) == entry["sha256"]
            for name, entry in self._tensors.items()
            if name in own
        )

    def chunk(self, name: str, number: int) -> Values:
        """The values under the masks in a tensor's chunk, by its number in the tensor."""
        first, last = self._tensors[name]["starts"][number : number + 2]
        return self.values(name, first, last - first)

    def values(self, name: str, first: int, count: int) -> Values:
        """Of all that was written of a tensor, in the order of its chunks, the values first … first + count."""
        entry = self._tensors[name]
        dtype = DTYPE[entry["dtype"]]
        with (self._folder / entry["file"]).open("rb") as handle:
            content = os.pread(handle.fileno(), count * dtype.itemsize, first * dtype.itemsize)
        return np.frombuffer(content, dtype)


def open_fitted(folder: Path, heading: str, own: Collection[str], processes: Processes) -> FittedValues | None:
    """What earlier processes finished under the same heading, if it is whole. own: what this process looks at of it.

    Every process calls it, and gets the same answer.
    """
    index = processes.gather(read_record(folder / INDEX) if processes.first else None)[0]
    found = None if index is None else FittedValues(folder, index)
    whole = found is not None and found.heading == heading and found.intact(own)
    return found if all(processes.gather(whole)) else None
