"""The SHA-256 of every input file that holds weights: found while libraries are imported, then behind what is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.runtime.chunks import worker_count

FileHash = tuple[str, str, str]  # input, file, SHA-256


class InputHashes:
    """Hashes of the inputs' files: the part of process `rank` of `count`.

    A file of a repo that lies in the cache is checked against the hash that the repo promises. deferred: it may be read
    before that is done; see `check`.
    """

    def __init__(
        self, inputs: Mapping[str, Checkpoint], rank: int = 0, count: int = 1, *, deferred: bool = False
    ) -> None:
        self._inputs = inputs
        jobs = [(name, file) for name, checkpoint in inputs.items() for file in checkpoint.files]
        self._own = jobs[rank::count]
        hashes = {job: self._here(*job, deferred=deferred) for job in self._own}
        self._hashes = {job: found for job, found in hashes.items() if found is not None}
        self._stop = threading.Event()
        self._ahead = ThreadPoolExecutor(1)
        self._ahead.submit(self._run_ahead)

    def _here(self, name: str, file: str, *, deferred: bool) -> FollowingHash | None:
        """What finds the hash; None if the file is elsewhere, or is checked when it is fetched."""
        source = self._inputs[name].source
        info, path = source.files[file], source.cached(file)
        if path is None or info.git_oid is not None:
            return None
        try:
            found = FollowingHash(path)
        except OSError:
            return None
        fits = found.size == info.size and (info.sha256 is None or deferred or found.known == info.sha256)
        return found if fits else None

    def _run_ahead(self) -> None:
        """Until somebody reads the files: then they are hashed behind that."""
        hashes = [*self._hashes.values()]
        for found in hashes:
            while not self._stop.is_set() and not any(one.followed for one in hashes) and found.advance():
                pass

    def followed(self, name: str, file: str) -> FollowingHash | None:
        """What is to follow the reading of a file, if anything is."""
        return self._hashes.get((name, file))

    def unchecked(self, name: str, file: str) -> bool:
        """Whether a file lies in the cache, and may be read, before it is known to be as its repo promises."""
        return (name, file) in self._hashes and self._inputs[name].source.files[file].sha256 is not None

    def check(self, name: str, file: str) -> None:
        """Wait until a file that is `unchecked` is known to be whole. Raises IntegrityError if it is not."""
        if self.unchecked(name, file):
            self._inputs[name].source.check(file, self._hashes[name, file].result())

    def wait(self) -> list[FileHash]:
        """All hashes, once they are known. Raises IntegrityError."""
        with ThreadPoolExecutor(worker_count()) as threads:
            return list(threads.map(lambda job: self._hash(*job), self._own))

    def _hash(self, name: str, file: str) -> FileHash:
        self.check(name, file)
        found = self._hashes.get((name, file))
        return name, file, found.result() if found else self._inputs[name].source.sha256(file)

    def __enter__(self) -> InputHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ahead.shutdown()
