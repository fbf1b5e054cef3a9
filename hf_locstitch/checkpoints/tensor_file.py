"""What a file of tensors is to its readers, wherever it lies."""

from __future__ import annotations

from typing import Protocol


class TensorFile(Protocol):
    """One safetensors file. Safe to share between threads."""

    def raw(self, start: int, stop: int) -> memoryview:
        """Bytes start … stop of the file."""
        ...

    def private(self, start: int, stop: int) -> memoryview:
        """The same bytes, writable: what is written changes neither the file nor what anyone else reads of it."""
        ...

    def release(self, start: int, stop: int) -> None:
        """These bytes will not be needed soon."""
        ...
