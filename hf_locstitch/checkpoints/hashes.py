"""The SHA-256 of every input file that holds weights, computed in the background while libraries are imported."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from hf_locstitch.checkpoints.checkpoint import Checkpoint

FileHash = tuple[str, str, str]  # input, file, SHA-256


class InputHashes:
    """Hashes of the inputs' files: the part of process `rank` of `count`."""

    def __init__(self, inputs: Mapping[str, Checkpoint], rank: int = 0, count: int = 1) -> None:
        jobs = [(name, file) for name, checkpoint in inputs.items() for file in checkpoint.files]
        self._inputs = inputs
        self._pool = ThreadPoolExecutor(1)
        self._running = [self._pool.submit(self._hash, name, file) for name, file in jobs[rank::count]]

    def _hash(self, name: str, file: str) -> FileHash:
        return name, file, self._inputs[name].source.sha256(file)

    def wait(self) -> list[FileHash]:
        """All hashes, once they are known."""
        return [future.result() for future in self._running]

    def __enter__(self) -> InputHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
