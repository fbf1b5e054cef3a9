"""Where a merge is made: a folder beside OUT that outlives a killed process, so that the next one resumes from it.

Its name holds a fingerprint of what is merged and how, so that different merges never mix.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import OutputError, RequestError, WorkError
from hf_locstitch.plan.plans import Plan
from hf_locstitch.runtime.files import write_atomically
from hf_locstitch.runtime.interrupts import Interrupted
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.version import __version__

FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ShardRecord:
    """A finished output shard. size: bytes. covered, pairs: how the masks overlap in it, as manifest.Manifest
    counts them."""

    sha256: str
    size: int
    covered: list[int]
    pairs: list[list[int]]


@dataclass(frozen=True)
class WorkDir:
    """stage: becomes OUT. spill: temporary files."""

    folder: Path

    @property
    def stage(self) -> Path:
        return self.folder / "out"

    @property
    def spill(self) -> Path:
        return self.folder / "spill"

    def record(self, file: str, shard: ShardRecord) -> None:
        """Note that a shard of the output is finished."""
        write_atomically(self._journal(file), json.dumps(asdict(shard)))

    def finished(self, file: str) -> ShardRecord | None:
        """The record of a shard, if its bytes still match."""
        if not self._journal(file).exists() or not (self.stage / file).exists():
            return None
        shard = ShardRecord(**json.loads(self._journal(file).read_text()))
        return shard if file_sha256(self.stage / file) == shard.sha256 else None

    def note_verified(self, files: Iterable[tuple[str, str]]) -> None:
        """Note (input, file) pairs that were verified after reading."""
        with (self.folder / "verified").open("a") as journal:
            journal.writelines(json.dumps(file) + "\n" for file in files)

    def verified(self) -> set[tuple[str, str]]:
        """The noted pairs; a line cut short by a kill is ignored."""
        path = self.folder / "verified"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {(name, file) for name, file in map(json.loads, lines)}

    def _journal(self, file: str) -> Path:
        return self.folder / f"{file}.done"


def fingerprint(plan: Plan) -> str:
    """A hash of everything that determines the output's bytes and the layout of temporary files."""
    facts = {
        "version": __version__,
        "command": plan.command,
        "recipe": plan.recipe.model_dump(mode="json", exclude={"out", "push_to", "private", "evaluate"}),
        "inputs": {name: checkpoint.source.identity for name, checkpoint in plan.inputs.items()},
        "data": {name: found.pinned.model_dump(mode="json") for name, found in plan.data.items()},
        "refit": {name: found.pinned.model_dump(mode="json") for name, found in plan.fit_data.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_work_dir(plan: Plan, near: Path, out: Path | None, processes: Processes) -> Iterator[WorkDir]:
    """A folder beside `near`; on success its stage becomes `out`, or is removed if that is None.

    A RequestError removes the folder, any other failure keeps it.
    """
    work = WorkDir(near.absolute().parent / f".{near.name}.{fingerprint(plan)[:16]}.partial")
    locks: list[int] = []
    try:
        processes.on_first(lambda: locks.append(_make(work)))
        yield work
        if processes.first:
            if out is not None:
                work.stage.replace(out)
            shutil.rmtree(work.folder, ignore_errors=True)
    except RequestError:
        if locks:
            shutil.rmtree(work.folder, ignore_errors=True)
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted.of(stop, work.folder if work.folder.exists() else None) from stop
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WorkError(
            f"the disk of {work.folder.parent} is full. Free some space and run the same command again: "
            f"it resumes where it stopped, from {work.folder}."
        ) from error
    finally:
        for lock in locks:
            os.close(lock)
        processes.leave()


def _make(work: WorkDir) -> int:
    """The folders, and a lock that ends with the process. Raises OutputError if another process works here."""
    work.stage.mkdir(parents=True, exist_ok=True)
    work.spill.mkdir(exist_ok=True)
    handle = os.open(work.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise OutputError(
            f"another process is making the same merge in {work.folder}. Wait for it, or use another --out."
        ) from error
    return handle
