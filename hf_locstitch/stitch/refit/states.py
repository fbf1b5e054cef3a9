"""Offloading the hidden states of a waiting pass from the device into memory or a file.

A pass waits in the middle of the model's code, which holds its hidden states in local variables. So the storages under
those tensors are emptied and refilled: whatever refers to them sees the same numbers as before. Only tensors that the
pass itself created are touched, no weights or buffers.
"""

from __future__ import annotations

import ctypes
import errno
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

SMALLEST = 1 << 16  # bytes: smaller tensors stay on the device


class Shelf(Protocol):
    """Keeps the bytes of a few storages between `put` and the next `put`."""

    def put(self, contents: Sequence[Tensor]) -> None:
        """contents: uint8 [bytes], on the device."""
        ...

    def get(self, number: int, into: Tensor) -> None:
        """into: uint8 [bytes], on the device, as many as were put under that index."""
        ...


class InMemory(Shelf):
    """In main memory, for a device with less."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def put(self, contents: Sequence[Tensor]) -> None:
        self._kept = [content.to("cpu", copy=True) for content in contents]

    def get(self, number: int, into: Tensor) -> None:
        into.copy_(self._kept[number])


class InFile(Shelf):
    """path: of the file, which is open only while it is read or written: there may be thousands of passes."""

    def __init__(self, path: Path) -> None:
        self._path, self._starts = path, [0]

    def put(self, contents: Sequence[Tensor]) -> None:
        self._starts = [0]
        with self._path.open("wb") as file:
            for content in contents:
                file.write(_memory(content.cpu()))
                self._starts.append(file.tell())

    def get(self, number: int, into: Tensor) -> None:
        content = into if into.device.type == "cpu" else torch.empty(len(into), dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.seek(self._starts[number])
            if file.readinto(_memory(content)) < len(content):
                raise OSError(errno.EIO, "the file was truncated while a refit used it", str(self._path))
        if content is not into:
            into.copy_(content)


class States:
    """The hidden states that one pass created."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._made: list[weakref.ref[Tensor]] = []
        self._away: list[UntypedStorage] = []
        self._sizes: list[int] = []

    def note(self, result: Any, given: Any) -> None:
        """Record what a torch function returned for its arguments. Views of weights do not count as created."""
        foreign = {_address(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and not _is_own(leaf)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not _is_own(leaf) and _address(leaf) not in foreign:
                leaf.locstitch_own = True  # pyright: ignore[reportAttributeAccessIssue]
                self._made.append(weakref.ref(leaf))

    def put_away(self) -> None:
        """Offload all tensors that are still in use. Raises OSError."""
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = {_address(tensor): tensor.untyped_storage() for tensor in alive}
        large = [one for one in storages.values() if one.nbytes() >= SMALLEST and one.resizable()]
        self._shelf.put([_bytes(storage) for storage in large])
        self._away, self._sizes = large, [storage.nbytes() for storage in large]
        for storage in large:
            storage.resize_(0)

    def take_back(self) -> None:
        """Bring back what was offloaded."""
        for number in range(len(self._away)):
            self._fill(number)
        self._away = []

    @contextmanager
    def at_hand(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, these tensors may be read, but must not be changed."""
        wanted = {_address(tensor) for tensor in tensors}
        numbers = [number for number, storage in enumerate(self._away) if storage._cdata in wanted]
        for number in numbers:
            self._fill(number)
        try:
            yield
        finally:
            for number in numbers:
                self._away[number].resize_(0)

    def _fill(self, number: int) -> None:
        storage = self._away[number]
        storage.resize_(self._sizes[number])
        self._shelf.get(number, _bytes(storage))


MakeStates = Callable[[], States | None]  # for one pass; None where its hidden states stay on the device


@contextmanager
def making_states(on: str, device: torch.device, folder: Path) -> Iterator[MakeStates]:
    """on: "device", "cpu" (memory) or "disk". folder: for files, which are deleted afterwards."""
    if on == "device" or on == device.type:
        yield lambda: None
    elif on == "cpu":
        yield lambda: States(InMemory())
    else:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
        folder.mkdir(parents=True)
        numbers = count()
        try:
            yield lambda: States(InFile(folder / str(next(numbers))))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_own(tensor: Tensor) -> bool:
    return "locstitch_own" in tensor.__dict__


def _memory(content: Tensor) -> Any:
    """As a buffer. Not by numpy(): a storage shared with numpy can no longer be resized."""
    return (ctypes.c_ubyte * len(content)).from_address(content.data_ptr())


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
