"""The inputs of a merge, opened for a pass: memory-mapped if their files are local, else read as they arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from hf_locstitch.adapters.opening import local_reader
from hf_locstitch.checkpoints.byte_ranges import Pieces, Range, byte_ranges, files_of
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.checkpoints.hashes import InputHashes
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import IntegrityError, RequestError
from hf_locstitch.plan.plans import Plan
from hf_locstitch.runtime.files import forget_locals
from hf_locstitch.runtime.processes import Processes, divide
from hf_locstitch.runtime.progress import Advance, Progress

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.download import Download
    from hf_locstitch.checkpoints.hub import HubSource

Ranges = Mapping[str, Sequence[Range]]  # file -> what of it
InputFile = tuple[str, str]  # input, file
NO_DOWNLOADS: Mapping[str, Download] = MappingProxyType({})


class OpenInputs:
    """readers: input name -> its reader. downloads: of the inputs that are still being downloaded. check: waits until
    what was read from the cache is verified."""

    def __init__(
        self,
        readers: Mapping[str, CheckpointReader],
        downloads: Mapping[str, Download] = NO_DOWNLOADS,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.readers, self._downloads, self._check = readers, downloads, check

    def verify(self, tensors: Iterable[str] | None = None) -> None:
        """Wait until every file, or of downloads those that hold `tensors`, is verified. Raises IntegrityError."""
        names = None if tensors is None else list(tensors)
        for name, download in self._downloads.items():
            download.verify(None if names is None else files_of(self.readers[name].checkpoint, names))
        self._check()

    def verify_read(self) -> None:
        """Wait until every file that was read from is verified; nothing more will be read. Raises IntegrityError."""
        for download in self._downloads.values():
            download.verify_read()
        self._check()


def all_here(plan: Plan) -> bool:
    """Whether every file that will be read is on this machine."""
    sources = {name: checkpoint.source for name, checkpoint in plan.inputs.items()}
    return all(sources[name].cached(file) for name, files in plan.needed.items() for file in files)


class Inputs:
    """Of one merge. folder: for temporary files. verified: called with each verified (input, file). hashes: they follow
    what is read. processes: each of them opens what it reads. streamed: whether what comes from the Hub is not kept.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        folder: Path,
        verified: Callable[[Iterable[InputFile]], None],
        hashes: InputHashes,
        processes: Processes,
        *,
        streamed: bool,
    ) -> None:
        self._plan, self._progress, self._folder, self._verified = plan, progress, folder, verified
        self._hashes, self._processes, self._streamed = hashes, processes, streamed
        self._unchecked: list[InputFile] = []
        self._damaged: InputFile | None = None
        self._checking = threading.Lock()
        self._kept: dict[str, CheckpointReader] = {}
        self._keeping: list[Download] = []
        self._whole: OpenInputs | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        forget_locals(error)
        self._stack.close()
        if self._damaged is not None:  # again: not every system deletes files that are mapped
            self._hashes.check(*self._damaged)
        if kind is not None and issubclass(kind, RequestError):  # such as NaN: to be believed only of whole files
            self._check()

    @property
    def all_here(self) -> bool:
        """Whether every file that will be read is on this machine, and of every process that shares in this."""
        return not self._streamed and all_here(self._plan)

    @property
    def computed(self) -> bool:
        """Whether an input's values are computed as they are read."""
        inputs = self._plan.inputs.values()
        return self._plan.aligned is not None or any(checkpoint.layout is not checkpoint for checkpoint in inputs)

    def fetch(self) -> OpenInputs:
        """All inputs complete on this machine, for any number of passes."""
        if self._whole is None:
            inputs, needed = self._plan.inputs, self._plan.needed
            paths = self._fetch_all(needed)
            aligned = self._plan.aligned
            own = aligned.own if aligned else inputs
            readers = {name: local_reader(own[name], paths[name], self._followed(name)) for name in inputs}
            for reader in readers.values():
                self._stack.callback(reader.close)
            readers = aligned.readers(readers) if aligned else readers
            self._whole = OpenInputs(readers, check=self._check)
        return self._whole

    def fetch_share(self, rank: int, count: int) -> None:
        """Put this process's share of the files on this machine, where `count` processes fetch one each."""
        files = [(name, file) for name, listed in self._plan.needed.items() for file in listed]
        sizes = [self._plan.inputs[name].source.files[file].size for name, file in files]
        own: dict[str, list[str]] = {}
        for (name, file), owner in zip(files, divide(sizes, count), strict=True):
            if owner == rank and not self._plan.inputs[name].source.local:
                own.setdefault(name, []).append(file)
        self._fetch_all(own)

    def _fetch_all(self, files: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Path]]:
        """Files of every input, on this machine, and verified or to be; those of several repos at a time."""
        found: dict[str, dict[str, Path]] = {}
        with self._fetching(files) as advance, ExitStack() as stack:
            downloads: dict[str, Download] = {}
            for name, listed in files.items():
                if not self._is_here(name, listed):
                    downloads[name] = self._caching(name, listed, advance, early=False)
                    downloads[name].start()
                    stack.callback(downloads[name].close)
            for name, listed in files.items():
                if name in downloads:
                    downloads[name].verify()
                found[name] = self._local(name, listed)
        return found

    @contextmanager
    def opened(self, pieces: Pieces, kept: Pieces | None = None) -> Iterator[OpenInputs]:
        """For one pass over `pieces`. kept: what a later pass will read of inputs other than its own."""
        if self.all_here or self.computed:  # which takes files that are complete
            yield self.fetch()
            return
        inputs, kept = self._plan.inputs, kept or {}
        names = [name for name in {**pieces, **kept} if name not in self._kept]
        for download in self._keeping:
            download.read_again()
        wanted = {name: byte_ranges(inputs[name], pieces.get(name, ())) for name in names}
        later = {name: byte_ranges(inputs[name], kept.get(name, ())) for name in names}
        readers, downloads = dict(self._kept), {}
        files = {name: [*{**wanted[name], **later[name]}] for name in names}
        with ExitStack() as stack:
            advance = stack.enter_context(self._fetching(files))
            for name in names:
                held = self._stack if name in kept else stack
                if self._is_here(name, files[name]):
                    readers[name] = MappedCheckpoint(inputs[name], self._local(name, files[name]), self._followed(name))
                    held.callback(readers[name].close)
                else:
                    downloads[name] = self._start_download(name, wanted[name], later[name], advance)
                    held.callback(downloads[name].close)
                    readers[name] = _arriving(inputs[name], downloads[name])
                if name in kept:
                    self._kept[name] = readers[name]
                    self._keeping += [downloads[name]] if name in downloads else []
            opened = OpenInputs(readers, downloads, self._check)
            try:
                yield opened
            except RequestError:  # likewise; raised in every process
                self._processes.together(opened.verify_read)
                raise

    def _fetching(self, files: Mapping[str, Sequence[str]]) -> AbstractContextManager[Advance]:
        """A bar over what will be downloaded; none if nothing is."""
        sources = {name: self._plan.inputs[name].source for name in files}
        size = sum(
            sources[name].files[file].size for name in files for file in files[name] if self._is_fetched(name, file)
        )
        return self._progress.bar("fetching", size) if size else nullcontext(_uncounted)

    def _is_fetched(self, name: str, file: str) -> bool:
        """Whether a file's bytes will come from the Hub."""
        source = self._plan.inputs[name].source
        streamed = self._streamed and not source.local and source.files[file].sha256 is not None
        return streamed or source.cached(file) is None

    def _is_here(self, name: str, files: Sequence[str]) -> bool:
        """Whether files are in a folder, or all in the cache, where they need not be verified before they are read."""
        cached = self._plan.settings.cache and all(self._hashes.unchecked(name, file) for file in files)
        return self._plan.inputs[name].source.local or cached

    def _local(self, name: str, files: Sequence[str]) -> dict[str, Path]:
        """Where files are that are on this machine."""
        source = self._plan.inputs[name].source
        cached = {file: source.cached(file) for file in files if self._hashes.unchecked(name, file)}
        paths = {file: path for file, path in cached.items() if path is not None}
        self._unchecked += [(name, file) for file in paths]
        whole = [file for file in files if file not in paths]
        paths |= {file: source.fetch(file) for file in whole}
        self._verified((name, file) for file in whole)
        return paths

    def _followed(self, name: str) -> dict[str, FollowingHash]:
        """What follows the reading of an input's files."""
        found = {file: self._hashes.followed(name, file) for file in self._plan.inputs[name].files}
        return {file: one for file, one in found.items() if one is not None}

    def _check(self) -> None:
        """Wait until every file that was read from the cache before it was verified is. Raises IntegrityError."""
        with self._checking:
            while self._unchecked:
                file = self._unchecked[0]
                try:
                    self._hashes.check(*file)
                except IntegrityError:
                    self._damaged = file
                    raise
                self._verified([file])
                self._unchecked.remove(file)

    def _start_download(self, name: str, wanted: Ranges, later: Ranges, advance: Advance) -> Download:
        """Returns the running download."""
        from hf_locstitch.checkpoints.download import StreamingDownload

        source, settings = self._plan.inputs[name].source, self._plan.settings
        if not self._streamed:
            download = self._caching(name, [*{**wanted, **later}], advance, early=True)
        else:
            window, noted = settings.window // self._processes.count, partial(self._note, name)
            download = StreamingDownload(source, wanted, later, self._folder, window, advance, noted)  # pyright: ignore[reportArgumentType]
        download.start()
        return download

    def _caching(self, name: str, files: Sequence[str], advance: Advance, *, early: bool) -> Download:
        from hf_locstitch.checkpoints.download import CachingDownload

        source: HubSource = self._plan.inputs[name].source  # pyright: ignore[reportAssignmentType]
        here = {file for file in files if not self._is_fetched(name, file)}
        return CachingDownload(source, files, advance, partial(self._note, name), here, early=early)

    def _note(self, name: str, file: str) -> None:
        self._verified([(name, file)])


def _uncounted(nbytes: int) -> None:
    """In place of a bar, for bytes that nobody waits for."""


def _arriving(checkpoint: Checkpoint, download: Download) -> CheckpointReader:
    from hf_locstitch.checkpoints.download import ArrivingFile

    return CheckpointReader(checkpoint, {file: ArrivingFile(download, file) for file in download.files})
