"""Files of a Hub repo while they are downloaded: a thread fetches one after another, readers wait for their bytes.

What was read must not be trusted until its whole file has arrived and matches its hash: see `Download.verify`.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hf_locstitch.checkpoints.byte_ranges import Range, without
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.read_ahead import ReadAhead
from hf_locstitch.checkpoints.source import Advance
from hf_locstitch.errors import IntegrityError
from hf_locstitch.runtime.chunks import check_wanted
from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE, PositionedFile

PATIENCE = 0.2  # seconds after which a reader looks whether its bytes are still wanted


class _Stopped(Exception):
    """The merge has ended; no more bytes are needed."""


class Download(ABC):
    """files: to download, in order; on_verified is called with each verified file. Many threads may read."""

    def __init__(
        self, source: HubSource, files: Sequence[str], advance: Advance, on_verified: Callable[[str], object]
    ) -> None:
        self.source, self.files, self.advance, self._on_verified = source, list(files), advance, on_verified
        self._changed = threading.Condition()
        self._arrived = dict.fromkeys(self.files, 0)
        self._opened: dict[str, PositionedFile] = {}
        self._awaited: list[tuple[str, int]] = []  # (file, stop): a reader waits for the bytes before stop
        self._read_from: set[str] = set()
        self._verified: set[str] = set()
        self._error: BaseException | None = None
        self._read_out = False  # nothing more will be read
        self._closed = False
        self._thread = threading.Thread(target=self._fetch_all, daemon=True)
        self._coming: ReadAhead | None = None  # through what bytes come

    def start(self) -> None:
        self._thread.start()

    def read(self, file: str, start: int, stop: int) -> bytearray:
        """Bytes start … stop, once they have arrived. Raises what the download raised."""
        content = bytearray(stop - start)
        with self._changed:
            self._read_from.add(file)
            self._awaited.append((file, stop))
            self._changed.notify_all()
            self._wait(lambda: self._arrived[file] >= stop)
            self._awaited.remove((file, stop))
        if self._opened[file].read_into(content, start) != len(content):
            raise IntegrityError(
                f"{file} of {self.source.label} was truncated while it was being read. Run the same command again."
            )
        return content

    def release(self, file: str, start: int, stop: int) -> None:
        """These bytes will not be read again in this pass."""
        del file, start, stop  # what is cached stays

    def read_again(self) -> None:
        """Another pass begins, over what was kept for it."""
        return  # what is cached stays

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Wait until files are complete and verified; raises IntegrityError if one is damaged.

        None means all of them, and that nothing more will be read.
        """
        wanted = set(self.files if files is None else files) & set(self.files)
        with self._changed:
            self._read_out |= files is None
            self._changed.notify_all()
            self._wait(lambda: wanted <= self._verified)

    def verify_read(self) -> None:
        """Wait until every file that was read from is complete and verified; nothing more will be read."""
        with self._changed:
            self._read_out = True
            self._changed.notify_all()
        self.verify(self._read_from)

    def close(self) -> None:
        """Stop the download and release its files."""
        with self._changed:
            self._closed = True
            self._error = self._error or _Stopped()
            self._changed.notify_all()
        if self._coming is not None:
            self._coming.close()
        if self._thread.is_alive():
            self._thread.join(timeout=1)
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not self._changed.wait_for(lambda: ready() or self._error is not None, PATIENCE):
            check_wanted()
        if not ready():
            assert self._error is not None
            raise self._error

    def _fetch_all(self) -> None:
        try:
            with self._read_ahead() as ahead:
                self._coming = ahead
                for file in self.files:
                    self._fetch(file, ahead)
                    self._on_verified(file)
                    with self._changed:
                        self._verified.add(file)
                        self._changed.notify_all()
        except _Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    @abstractmethod
    def _read_ahead(self) -> ReadAhead:
        """Through what the files come."""

    @abstractmethod
    def _fetch(self, file: str, ahead: ReadAhead) -> None:
        """Fetch a file, reporting progress to `_tell`, and check it."""

    def _tell(self, file: str, opened: PositionedFile, upto: int) -> None:
        """The first `upto` bytes of a file can be read from `opened`, which the caller may close."""
        with self._changed:
            if self._closed:
                raise _Stopped
            if file not in self._opened:
                self._opened[file] = opened.duplicate()
            before, self._arrived[file] = self._arrived[file], upto
            if any(name == file and before < stop <= upto for name, stop in self._awaited):
                self._changed.notify_all()

    def _tell_whole(self, file: str, path: Path) -> None:
        """All of a file can be read."""
        with path.open("rb", buffering=0) as whole:
            self._tell(file, PositionedFile(whole.fileno()), self.source.files[file].size)


class CachingDownload(Download):
    """Into the user's Hub cache, at full speed. here: files that are in it already, which make no progress. early:
    whether a file may be read while it comes, where a file that is open can be renamed; otherwise one that comes
    damaged is fetched once more."""

    def __init__(
        self,
        source: HubSource,
        files: Sequence[str],
        advance: Advance,
        on_verified: Callable[[str], object],
        here: Collection[str] = (),
        *,
        early: bool = True,
    ) -> None:
        super().__init__(source, files, advance, on_verified)
        self._here, self._early = frozenset(here), early and OPEN_FILES_MOVE

    def _read_ahead(self) -> ReadAhead:
        fetched = [file for file in self.files if self.source.files[file].sha256 is not None]
        return self.source.read_ahead(fetched, self.source.arrived)

    def _fetch(self, file: str, ahead: ReadAhead) -> None:
        advance: Advance = (lambda _: None) if file in self._here else self.advance
        path = self.source.fetch(file, advance, partial(self._tell, file) if self._early else None, ahead)
        self._tell_whole(file, path)


class StreamingDownload(Download):
    """Through unnamed files in `folder` that hold only the bytes still to be read.

    needs: what will be read and released, file by file in the order of first use; ranges ascending. kept: what a later
    pass will read. window: how many bytes of needs may run ahead of the readers, unless one of them is waiting.
    """

    def __init__(
        self,
        source: HubSource,
        needs: Mapping[str, Sequence[Range]],
        kept: Mapping[str, Sequence[Range]],
        folder: Path,
        window: int,
        advance: Advance,
        on_verified: Callable[[str], object],
    ) -> None:
        super().__init__(source, list({**needs, **kept}), advance, on_verified)
        self._needs, self._kept, self._folder, self._window = needs, kept, folder, window
        self._again = False  # whether what was kept is being read
        self._ahead = 0  # bytes that arrived and were not released

    def release(self, file: str, start: int, stop: int) -> None:
        for first, last in without((start, stop), self._kept.get(file, ())):
            self._opened[file].punch_hole(first, last)
        with self._changed:
            self._ahead -= 0 if self._again else stop - start
            self._changed.notify_all()

    def read_again(self) -> None:
        """The pass begins that ranges were kept for; from now on they are released for good."""
        self._kept, self._again = {}, True

    def _read_ahead(self) -> ReadAhead:
        return self.source.read_ahead(file for file in self.files if self.source.files[file].sha256 is not None)

    def _fetch(self, file: str, ahead: ReadAhead) -> None:
        if self.source.files[file].sha256 is None:  # small, not in LFS: the client fetches it in one go
            self._tell_whole(file, self.source.fetch(file, self.advance))
            return
        digest, at = hashlib.sha256(), 0
        needs, kept = list(self._needs.get(file, ())), list(self._kept.get(file, ()))
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as unnamed:
            out = PositionedFile(unnamed.fileno())
            for block in self.source.stream(file, ahead=ahead):
                digest.update(block)
                _write_ranges(out, block, at, kept)
                written = _write_ranges(out, block, at, needs)
                at += len(block)
                self.advance(len(block))
                self._tell(file, out, at)
                self._hold_back(written)
        if digest.hexdigest() != self.source.files[file].sha256:
            raise self.source.damaged(file, digest.hexdigest())

    def _hold_back(self, written: int) -> None:
        with self._changed:
            self._ahead += written
            self._changed.wait_for(lambda: self._ahead <= self._window or self._closed or self._is_awaited())

    def _is_awaited(self) -> bool:
        return self._read_out or any(self._arrived[file] < stop for file, stop in self._awaited)


def _write_ranges(out: PositionedFile, block: bytes, at: int, ranges: list[Range]) -> int:
    """Write the part of a block, starting at byte `at`, that lies in the ranges; drop ranges passed. Bytes written."""
    view, end, written = memoryview(block), at + len(block), 0
    while ranges and ranges[0][0] < end:
        start, stop = ranges[0]
        part = view[max(start, at) - at : stop - at]
        out.write(part, max(start, at))
        written += len(part)
        if stop > end:
            break
        ranges.pop(0)
    return written


class ArrivingFile:
    """A TensorFile that is still being downloaded: reading waits for it."""

    def __init__(self, download: Download, file: str) -> None:
        self._download, self._file = download, file

    def raw(self, start: int, stop: int) -> memoryview:
        return memoryview(self._download.read(self._file, start, stop))

    def private(self, start: int, stop: int) -> memoryview:
        return self.raw(start, stop)  # read into memory of its own

    def release(self, start: int, stop: int) -> None:
        self._download.release(self._file, start, stop)
