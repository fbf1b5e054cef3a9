"""The bytes of a repo's files in order, fetched as ranges over several connections that run ahead of the reader."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from hf_locstitch.runtime.processes import own_share

IN_ALL = own_share(16)  # connections of this process; a repo's first piece is fetched even beyond it
CONNECTIONS = min(8, IN_ALL)  # of one repo
SMALLEST, LARGEST = 1 << 20, 1 << 23  # bytes of a piece; those that wait for their turn are held in memory
ROUNDS = 4  # pieces that each connection fetches of a small repo; the last are smaller, so that all end together
AT_ONCE = 1 << 18  # bytes that arrive before the reader is woken

Fetch = Callable[[str, int, int], Iterator[bytes]]  # (file, start, stop) -> these bytes, in order


class Slots:
    """How many pieces this process fetches or holds, of all repos; fewer while a server turns connections away."""

    def __init__(self, most: int) -> None:
        self._most = self._limit = float(most)
        self._taken = 0
        self.received = 0  # bytes, by all
        self._changed = threading.Condition()

    def take(self, at_once: Callable[[], bool]) -> None:
        """Wait for a slot, or take one at once."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken < int(self._limit) or at_once())
            self._taken += 1

    def free(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def ask_again(self) -> None:
        """Whoever waits may have a reason by now to take a slot at once."""
        with self._changed:
            self._changed.notify_all()

    def turned_away(self) -> None:
        """A server did not answer a connection."""
        with self._changed:
            self._limit = max(1.0, self._limit - 1)

    def served(self) -> None:
        """A piece came whole."""
        with self._changed:
            self._limit = min(self._most, self._limit + 0.25)
            self._changed.notify_all()


SLOTS = Slots(IN_ALL)


@dataclass(eq=False)
class Piece:
    """Bytes start … stop of a file, in blocks that the reader takes out. done: nothing more will come."""

    file: str
    start: int
    stop: int
    blocks: list[bytes] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False
    dropped: bool = False


class ReadAhead:
    """A repo's files, which are read one after another, each from its first missing byte on.

    sizes: file -> bytes, in the order of reading. begin: a file's first missing byte, as far as it can be told before
    the file is read. whole: whether a file only comes as a whole, from a server that ignores ranges.
    """

    def __init__(
        self, fetch: Fetch, sizes: Mapping[str, int], begin: Callable[[str], int], whole: Callable[[str], bool]
    ) -> None:
        self._fetch, self._sizes, self._begin, self._whole = fetch, dict(sizes), begin, whole
        self._size = min(max(sum(sizes.values()) // (CONNECTIONS * ROUNDS), SMALLEST), LARGEST)
        self._changed = threading.Condition()
        self._plan: Iterator[Piece] = iter(())  # what is asked for next
        self._planned = False  # whether there is more of it
        self._pieces: deque[Piece] = deque()  # asked for and not yet read, in order
        self._closed = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ask for nothing more."""
        with self._changed:
            self._closed = True
            self._drop_all()
            self._changed.notify_all()
        SLOTS.ask_again()

    def read(self, file: str, start: int) -> Iterator[bytes]:
        """The file's bytes from `start` on. Raises what fetching them raised."""
        at, size = start, self._sizes[file]
        if at < size:
            self._turn_to(file, at)
        while at < size:
            piece = self._piece_at(file, at)
            if piece is None:
                yield from self._fetch(file, at, size)
                return
            try:
                yield from self._blocks(piece)
            finally:
                with self._changed:
                    self._drop(piece)
            at = piece.stop

    def _turn_to(self, file: str, start: int) -> None:
        """Let what is asked for begin with this byte, whatever was planned."""
        with self._changed:
            first = self._pieces[0] if self._pieces else None
            if first is None or (first.file, first.start) != (file, start):
                self._drop_all()
                self._plan, self._planned = self._pieces_from(file, start), True
                self._changed.notify_all()
        while len(self._threads) < min(CONNECTIONS, 1 + sum(self._sizes.values()) // self._size):
            self._threads.append(threading.Thread(target=self._work, args=(not self._threads,), daemon=True))
            self._threads[-1].start()

    def _pieces_from(self, file: str, start: int) -> Iterator[Piece]:
        """Of the file, and of those that are read after it."""
        files = list(self._sizes)
        files = files[files.index(file) :]
        left = sum(self._sizes[name] for name in files)
        for name in files:
            at, stop = start if name == file else self._begin(name), self._sizes[name]
            left -= stop
            while at < stop and not self._whole(name):
                size = max(min(self._size, (stop - at + left) // CONNECTIONS), SMALLEST)
                piece = Piece(name, at, at + -(-(stop - at) // -(-(stop - at) // size)))  # all of about one size
                at = piece.stop
                yield piece

    def _piece_at(self, file: str, at: int) -> Piece | None:
        """The piece that begins there, once it is asked for; None if the rest of the file comes as a whole."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or not self._planned or self._closed)
            first = self._pieces[0] if self._pieces else None
        return first if first is not None and (first.file, first.start) == (file, at) else None

    def _blocks(self, piece: Piece) -> Iterator[bytes]:
        left = piece.stop - piece.start
        while left:
            with self._changed:
                self._changed.wait_for(lambda: piece.done or self._closed or sum(map(len, piece.blocks)) >= AT_ONCE)
                blocks, piece.blocks = piece.blocks, []
            if not blocks:
                raise piece.error or EOFError(f"{left} bytes of {piece.file} are missing")
            left -= sum(map(len, blocks))
            yield from blocks

    def _work(self, foremost: bool) -> None:
        """One connection: fetch piece after piece. foremost: whether it may always fetch what is waited for."""
        while self._wait_for_room():
            SLOTS.take(at_once=lambda: self._closed or (foremost and not self._pieces))
            piece = self._ask()
            if piece is None:
                SLOTS.free()
                continue
            try:
                self._fill(piece)
            except BaseException as error:
                piece.error = error
            with self._changed:
                piece.done = True
                if piece.dropped:
                    SLOTS.free()
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Until another piece may be asked for; False if none will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._planned and len(self._pieces) < IN_ALL))
            return not self._closed

    def _ask(self) -> Piece | None:
        """The next piece, noted as asked for; None if another connection was faster."""
        with self._changed:
            if self._closed or len(self._pieces) >= IN_ALL:
                return None
            piece = next(self._plan, None)
            if piece is None:
                self._planned = False
            else:
                self._pieces.append(piece)
            self._changed.notify_all()
            return piece

    def _fill(self, piece: Piece) -> None:
        held = 0
        for block in self._fetch(piece.file, piece.start, piece.stop):
            held += len(block)
            with self._changed:
                if piece.dropped:
                    return
                piece.blocks.append(block)
                if held >= AT_ONCE:
                    held = 0
                    self._changed.notify_all()
        SLOTS.served()

    def _drop(self, piece: Piece) -> None:
        """Forget a piece, which was read or is not wanted."""
        if piece.dropped:
            return
        piece.dropped = True
        self._pieces.remove(piece)
        piece.blocks = []
        if piece.done:
            SLOTS.free()
        else:
            SLOTS.ask_again()
        self._changed.notify_all()

    def _drop_all(self) -> None:
        for piece in list(self._pieces):
            self._drop(piece)
