"""Where a merge is made: a folder beside OUT that outlives a killed process, so that the next one resumes from it.

Its name holds a fingerprint of what is merged and how, so that different merges never mix.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import OutputError, RequestError, WorkError
from hf_locstitch.plan.plans import ModelPlan, Plan
from hf_locstitch.plan.recipe_file import NOT_THE_MERGE
from hf_locstitch.runtime.files import forget_locals, write_atomically
from hf_locstitch.runtime.interrupts import Interrupted
from hf_locstitch.runtime.journal import append_lines, read_lines, read_record, write_record
from hf_locstitch.runtime.locks import remove_locked, try_lock
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.version import __version__

if TYPE_CHECKING:
    from filelock import BaseFileLock

WORK_DIR = re.compile(r"(?P<near>\..*)\.[0-9a-f]{16}\.partial")  # its name, as `work_dir_beside` has it
FULL = (errno.ENOSPC, errno.EDQUOT)
SEEN_WITHIN = 10.0  # seconds after which what one node has made is seen on another, if they share the folder
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY, errno.EXDEV)


@dataclass(frozen=True)
class ShardRecord:
    """A finished output shard. size: bytes. covered, pairs: how the masks overlap in it, as manifest.Manifest
    counts them. processes: how many wrote it."""

    sha256: str
    size: int
    covered: list[int]
    pairs: list[list[int]]
    processes: int = 1


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
        """Note that a shard of the output is finished, and that what the first process read for it is verified."""
        write_record(self._journal(file), asdict(shard))

    def note_part(self, file: str, rank: int) -> None:
        """Note that what another process read for its part of a shard is verified."""
        write_record(self._part(file, rank), True)

    def forget(self, file: str) -> None:
        """A shard is about to be written anew."""
        for path in self.folder.glob(f"{glob.escape(self._journal(file).name)}*"):
            path.unlink()

    def finished(self, file: str) -> ShardRecord | None:
        """The record of a shard, if it is whole and the shard's bytes match it."""
        shard = self._noted(file)
        if shard is None or not (self.stage / file).is_file():
            return None
        return shard if file_sha256(self.stage / file) == shard.sha256 else None

    def note_verified(self, files: Iterable[tuple[str, str]], processes: Processes) -> None:
        """Note (input, file) pairs that this process has verified after reading."""
        append_lines(self.folder / f"verified.{processes.rank}-of-{processes.count}", files)

    def verified(self, count: int) -> set[tuple[str, str]]:
        """The pairs that any of so many processes noted: what others kept of a file was not told apart by that."""
        noted = [read_lines(self.folder / f"verified.{rank}-of-{count}") for rank in range(count)]
        return {(name, file) for lines in noted for name, file in lines}

    def clear_stage(self) -> None:
        """Remove what an earlier process left there, all but the shards that it noted: everything else is made anew."""
        for path in self.stage.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif self._noted(path.name) is None:
                path.unlink()

    def _noted(self, file: str) -> ShardRecord | None:
        """The record of a shard, if all that it was made from is verified."""
        if (found := read_record(self._journal(file))) is None:
            return None
        shard = ShardRecord(**found)
        parts = [read_record(self._part(file, rank)) for rank in range(1, shard.processes)]
        return shard if all(parts) else None

    def _part(self, file: str, rank: int) -> Path:
        return self.folder / f"{file}.done.{rank}"

    def _journal(self, file: str) -> Path:
        return self.folder / f"{file}.done"


def made_files(plan: Plan) -> Mapping[str, bytes]:
    """Files of the output that are not copied: their content is of files that no commit or recipe pins."""
    return plan.side_files.made if isinstance(plan, ModelPlan) else {}


def fingerprint(plan: Plan) -> str:
    """A hash of everything that determines the output's bytes and the layout of temporary files."""
    facts = {
        "version": __version__,
        "command": plan.command,
        "recipe": plan.recipe.model_dump(mode="json", exclude={*NOT_THE_MERGE}),
        "inputs": {name: checkpoint.source.identity for name, checkpoint in plan.inputs.items()},
        "merges": {name: merge.identity for name, merge in plan.merges.items()},
        "data": {name: found.pinned.model_dump(mode="json") for name, found in plan.data.items()},
        "made": hashlib.sha256(b"\0".join(made.values())).hexdigest() if (made := made_files(plan)) else None,
        "refit": {name: found.pinned.model_dump(mode="json") for name, found in plan.fit_data.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_work_dir(plan: Plan, near: Path, out: Path | None, processes: Processes) -> Iterator[WorkDir]:
    """A folder beside `near`, as `working_in` has it. Links in `near` are followed."""
    with working_in(_work_dir(plan, near), out, processes) as work:
        yield work


@contextmanager
def working_in(work: WorkDir, out: Path | None, processes: Processes) -> Iterator[WorkDir]:
    """Make the folder; on success its stage becomes `out`, or is removed if that is None.

    Links in `out` are followed. A RequestError removes the folder, any other failure keeps it.
    """
    locks: list[BaseFileLock] = []  # of the first process alone
    try:
        processes.on_first(lambda: locks.append(_make(work)))
        _check_common(work, processes)
        yield work
        if locks and out is not None:
            _move(work.stage, out)
        for lock in locks:
            remove_locked(work.folder, lock)
    except RequestError as error:
        forget_locals(error)
        for lock in locks:
            remove_locked(work.folder, lock)
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
            lock.release()
        processes.leave()


def _check_common(work: WorkDir, processes: Processes) -> None:
    """Raises OutputError unless every process sees the folder that the first has made."""
    if processes.count == 1:
        return
    token = processes.gather(secrets.token_hex(8))[0]
    processes.on_first(lambda: write_atomically(work.folder / "token", token))

    def look() -> None:
        until = time.monotonic() + SEEN_WITHIN
        while not ((file := work.folder / "token").is_file() and file.read_text("utf-8") == token):
            if time.monotonic() > until:
                raise OutputError(
                    f"process {processes.rank} on {platform.node()} does not see {work.folder}, where the first "
                    "process works. All nodes must reach --out (and for --push-to alone HF_HOME) under one path: use a "
                    "folder that they share."
                )
            time.sleep(0.1)

    processes.together(look)


def clear_work(plan: Plan, out: Path) -> None:
    """Remove what a process left that was killed after it had made `out`, unless it is still there."""
    work = _work_dir(plan, out)
    if work.folder.exists() and (lock := try_lock(work.folder / "lock")) is not None:
        remove_locked(work.folder, lock)


def _work_dir(plan: Plan, near: Path) -> WorkDir:
    return work_dir_beside(near, fingerprint(plan))


def work_dir_beside(near: Path, fingerprint: str) -> WorkDir:
    """fingerprint: of what is made there. Links in `near` are followed."""
    near = near.resolve()
    return WorkDir(near.parent / f".{near.name}.{fingerprint[:16]}.partial")


def beside_it(own: Path) -> Iterator[Path]:
    """The folders of other work for the same output, by their names; see `work_dir_beside`."""
    near = _output_of(own)
    return (one for one in own.parent.iterdir() if one != own and near is not None and _output_of(one) == near)


def _output_of(folder: Path) -> str | None:
    """The dotted name of what is made in the folder of a WorkDir; None for other folders."""
    found = WORK_DIR.fullmatch(folder.name)
    return found["near"] if found else None


def _move(stage: Path, out: Path) -> None:
    """Make the finished folder `out`, in one step. Raises WorkError if something has come to be there meanwhile, or
    the folder cannot be moved."""
    place = out.resolve()
    try:
        with suppress(FileNotFoundError):
            place.rmdir()  # an empty folder, and nothing else; Windows renames to what does not exist alone
        stage.rename(place)
    except PermissionError as error:  # on Windows also of what is open
        raise WorkError(
            f"{out} could not be made ({error.strerror}): its folder cannot be changed, or another program has a file "
            f"in {stage} open. Mend that and run the same command again: it resumes where it stopped."
        ) from error
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        raise WorkError(
            f"{out} could not be made ({error.strerror}): something is there that was not when the work began, such "
            f"as another result. It is left as it is; the finished one is in {stage}. Move it where you "
            "want it."
        ) from error


def _make(work: WorkDir) -> BaseFileLock:
    """The folders, and a lock that ends with the process. Raises OutputError if another process works here."""
    work.folder.mkdir(parents=True, exist_ok=True)
    if (lock := try_lock(work.folder / "lock")) is None:
        raise OutputError(
            f"another process is making the same merge in {work.folder}. Wait for it, or use another --out."
        )
    work.stage.mkdir(exist_ok=True)
    work.spill.mkdir(exist_ok=True)
    work.clear_stage()
    return lock
