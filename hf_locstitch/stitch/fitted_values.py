"""Fitted values on disk during a merge: those under the masks, as they will be written, or whole tensors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.runtime.dtypes import DTYPE, Values
from hf_locstitch.runtime.files import sync_file
from hf_locstitch.runtime.journal import read_record, write_record
from hf_locstitch.runtime.processes import Processes

INDEX = "index.json"
BEGUN = "begun.json"


class FittedWriter:
    """own: the tensors that this process writes, each once. `finish` makes everything readable.

    resume: what identifies the values, where each can be made by itself: those that an earlier process wrote under the
    same one are `known`; else the folder is emptied. Every process creates a writer and finishes it.
    """

    def __init__(self, folder: Path, own: Collection[str], processes: Processes, *, resume: str | None = None) -> None:
        def lay_out() -> None:
            if resume is None or read_record(folder / BEGUN) != resume:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_record(folder / BEGUN, resume)

        processes.on_first(lay_out)
        self._folder, self._own, self._processes = folder, own, processes
        self._resume = resume is not None
        self._tensors: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, dict[str, Any]] = {}

    def writes(self, names: Sequence[str]) -> bool:
        """Whether this process writes any of these tensors."""
        return any(name in self._own for name in names)

    def known(self, name: str) -> bool:
        """Whether an earlier process wrote a tensor, and its file is intact: it need not be written again."""
        entry = read_record(self._record(name)) if self._resume else None
        if entry is None or not _intact(self._folder / entry["file"], entry["sha256"]):
            return False
        self._tensors[name] = entry
        return True

    def write(self, name: str, dtype: str, pieces: Iterable[torch.Tensor]) -> None:
        """pieces: the values of each chunk in turn, in the dtype (its name on disk)."""
        self.begin(name, dtype)
        for piece in pieces:
            self.append(name, piece)
        self.end(name)

    def begin(self, name: str, dtype: str) -> None:
        """As `write` for a tensor whose chunks are not all known yet: they are appended, up to its end."""
        file = _file_of(name)
        (self._folder / file).write_bytes(b"")
        self._begun[name] = {"file": file, "dtype": dtype, "starts": [0]}

    def append(self, name: str, piece: torch.Tensor) -> None:
        """piece: the values of the next chunk."""
        entry = self._begun[name]
        with (self._folder / entry["file"]).open("ab") as handle:
            handle.write(piece.contiguous().view(torch.uint8).numpy().data)
        entry["starts"].append(entry["starts"][-1] + len(piece))

    def end(self, name: str) -> None:
        """All chunks were appended."""
        entry = self._begun.pop(name)
        file = entry["file"]
        self._tensors[name] = {**entry, "sha256": file_sha256(self._folder / file)}
        if self._resume:
            sync_file(self._folder / file)
            write_record(self._record(name), self._tensors[name])

    def _record(self, name: str) -> Path:
        return self._folder / f"{_file_of(name)}.done"

    @property
    def names(self) -> set[str]:
        """Names of the tensors written by this process; after `finish`, by all processes."""
        return set(self._tensors)

    def finish(self, heading: str, **notes: Any) -> None:
        """heading: identifies what the values belong to. notes: further facts, JSON-serializable."""
        self._tensors = {name: entry for told in self._processes.gather(self._tensors) for name, entry in told.items()}

        content = {"heading": heading, "tensors": self._tensors, "notes": notes}
        self._processes.on_first(lambda: write_record(self._folder / INDEX, content))


def _file_of(tensor: str) -> str:
    """A name is no file name: it may be long, or differ from another in case only."""
    return f"{hashlib.sha256(tensor.encode()).hexdigest()[:32]}.bin"


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


class FittedValues:
    """What FittedWriters wrote. Thread-safe. index: as `finish` wrote it."""

    def __init__(self, folder: Path, index: Any) -> None:
        self.heading: str = index["heading"]
        self.notes: dict[str, Any] = index["notes"]
        self._tensors = {name: {**entry, "path": folder / entry["file"]} for name, entry in index["tensors"].items()}

    def over(self, others: FittedValues) -> FittedValues:
        """These, and those of the tensors that only the others have."""
        both = copy(self)
        both._tensors = {**others._tensors, **self._tensors}
        return both

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def intact(self, own: Collection[str]) -> bool:
        """Whether the files of these tensors are unchanged."""
        return all(_intact(entry["path"], entry["sha256"]) for name, entry in self._tensors.items() if name in own)

    def chunk(self, name: str, number: int) -> Values:
        """The values under the masks in a chunk, by the index of the chunk in its tensor."""
        first, last = self._tensors[name]["starts"][number : number + 2]
        return self.values(name, first, last - first)

    def values(self, name: str, first: int, count: int) -> Values:
        """The values first … first + count of all that was written for a tensor, in the order of its chunks."""
        entry = self._tensors[name]
        dtype = DTYPE[entry["dtype"]]
        with entry["path"].open("rb", buffering=0) as handle:
            handle.seek(first * dtype.itemsize)
            content = handle.read(count * dtype.itemsize)
        return np.frombuffer(content, dtype)


def open_fitted(folder: Path, heading: str, own: Collection[str], processes: Processes) -> FittedValues | None:
    """What earlier processes finished under the same heading, if intact. own: the tensors that this process checks.

    Every process calls this and gets the same answer.
    """
    index = processes.gather(read_record(folder / INDEX) if processes.first else None)[0]
    fitted = None if index is None else FittedValues(folder, index)
    whole = fitted is not None and fitted.heading == heading and fitted.intact(own)
    return fitted if all(processes.gather(whole)) else None
