"""Refitted values on the disk while a merge is under way: those under the masks, as they will be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_locstitch.checkpoints.dtypes import DTYPE, Values
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

    def chunk(self, name: str, number: int) -> Values:
        """The values under the masks in a tensor's chunk, by its number in the tensor."""
        entry = self._tensors[name]
        dtype = DTYPE[entry["dtype"]]
        first, last = entry["starts"][number : number + 2]
        with (self._folder / entry["file"]).open("rb") as handle:
            content = os.pread(handle.fileno(), (last - first) * dtype.itemsize, first * dtype.itemsize)
        return np.frombuffer(content, dtype)


def open_refitted(folder: Path, heading: str) -> Refitted | None:
    """What an earlier process finished under the same heading, if it is whole."""
    try:
        found = Refitted(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.heading == heading and found.intact() else None
