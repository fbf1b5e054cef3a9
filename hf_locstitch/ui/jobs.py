"""Merges as jobs: queued, a bounded number at a time, only what fits the disk, and gone on with after a stop or a kill.

What is written down of a job is what was asked for and how it ended; no token. A job that a dead server left goes on
when its owner asks for it, with the token of that moment; the merge itself finds what the dead process has finished.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.files import write_atomically
from hf_locstitch.runtime.human import human
from hf_locstitch.ui.calls import Call, Event
from hf_locstitch.ui.order import Order
from hf_locstitch.ui.visitor import Visitor, home_of, owner_key

Status = Literal["queued", "running", "stopping", "done", "failed", "stopped", "interrupted"]
ACTIVE = ("queued", "running", "stopping")
AGAIN = ("failed", "stopped", "interrupted")  # from which it can go on
LEFT = "The server was stopped while this merge was under way."
LISTED = 20  # jobs of one person that are known
KNOWN = 1_000  # jobs of all that are known, beside those that wait or run
KEPT = 7 * 24 * 3600.0  # seconds after which a job is known no more; a stranger's leaves nothing behind then

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One bar of a merge. total: 0 where it is not known. unit: "B" for bytes."""

    name: str
    done: int = 0
    total: int = 0
    unit: str = "B"


@dataclass(frozen=True)
class Job:
    """A merge that somebody asked for. disk: bytes that it may need. said: warnings while it ran."""

    key: str
    owner: str
    order: Order
    disk: int = 0
    status: Status = "queued"
    made: float = field(default_factory=time.time)
    stages: tuple[Stage, ...] = ()
    said: tuple[str, ...] = ()
    error: str = ""
    url: str = ""
    commit: str = ""
    attempts: int = 0

    @property
    def active(self) -> bool:
        """Whether it still waits or works."""
        return self.status in ACTIVE

    @property
    def resumable(self) -> bool:
        """Whether it can be started again."""
        return self.status in AGAIN

    def after(self, event: Event) -> Job:
        """The job once an event of its worker has come."""
        kind = event["event"]
        if kind == "progress":
            stage = Stage(event["stage"], event["done"], event["total"], event["unit"])
            return replace(self, stages=(*(one for one in self.stages if one.name != stage.name), stage))
        if kind == "warning":
            return replace(self, said=(*self.said, event["text"])) if event["text"] not in self.said else self
        if kind == "result":
            return replace(self, status="done", url=event["url"] or "", commit=event["commit"] or "", error="")
        if kind == "error":
            return replace(self, status="failed", error=event["text"])
        if kind == "stopped":
            return replace(self, status="stopped")
        if kind == "died":
            text = f"The process of this merge ended early (status {event['status']}): it may have run out of memory."
            return replace(self, status="failed", error=text)
        return self


class Running(Protocol):
    """The worker of a job."""

    def events(self) -> Iterator[Event]: ...

    def stop(self) -> None: ...


class Jobs:
    """All jobs of a server.

    Args:
        folder: Where they are written down.
        start: Starts the worker of a job, for a visitor.
        at_once: How many run at a time.
        waiting: How many may wait.
        free: Bytes that are free on the disk.
        forget: Removes what the jobs of an owner have left, once none of them can be gone on with.
    """

    def __init__(
        self,
        folder: Path,
        start: Callable[[Job, Visitor], Running],
        *,
        at_once: int = 1,
        waiting: int = 20,
        free: Callable[[], int] | None = None,
        forget: Callable[[str], object] = lambda _: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._start, self._at_once, self._waiting = folder, start, at_once, waiting
        self._free, self._forget = free or (lambda: shutil.disk_usage(folder).free), forget
        self._changed = threading.Condition()
        self._jobs = {job.key: job for job in map(_read, sorted(folder.glob("*.json"))) if job is not None}
        self._queue: list[tuple[str, Visitor]] = []
        self._running: dict[str, Running | None] = {}

    def submit(self, order: Order, visitor: Visitor, disk: int) -> Job:
        """Queue a merge, or go on with the same one if it was stopped. Raises RequestError.

        Args:
            order: With a target.
            visitor: Signed in, or the user of this machine.
            disk: Bytes that it may need, by its plan.
        """
        if not order.push_to or not visitor.writable:
            raise RequestError("sign in first, and say where the merge is pushed to.")
        owner = owner_key(visitor)
        with self._changed:
            mine = [job for job in self._jobs.values() if job.owner == owner and job.active]
            key = order.key(owner)
            if any(job.key == key for job in mine):
                return self._jobs[key]
            if mine and not visitor.here:
                raise RequestError(
                    f"your merge to {mine[0].order.push_to} is still under way. Wait for it, or stop it."
                )
            if len(self._queue) >= self._waiting:
                raise RequestError(f"{len(self._queue)} merges are waiting already. Try again later.")
            if disk > (free := self._free()):
                raise RequestError(
                    f"this merge needs up to {human(disk)} of disk, and only {human(free)} is free here."
                )
            before = self._jobs.get(key)
            attempts = before.attempts if before else 0
            if not visitor.here:  # a stranger has one merge that can be gone on with: the disk is everybody's
                others = [job for job in self._jobs.values() if job.owner == owner and job.key != key]
                self._drop([job for job in others if job.resumable])
            self._note(Job(key, owner, order, disk, attempts=attempts + 1))
            self._queue.append((key, visitor))
            self._drop(_outdated(self._jobs.values(), time.time()))
            self._start_what_fits()
            return self._jobs[key]

    def resume(self, key: str, visitor: Visitor) -> Job:
        """Start a job of this visitor again; what it had finished is not done again. Raises RequestError."""
        job = self._own(key, visitor)
        return self.submit(job.order, visitor, job.disk) if job.resumable else job

    def stop(self, key: str, visitor: Visitor) -> Job:
        """Stop a job of this visitor. Raises RequestError."""
        with self._changed:
            job = self._own(key, visitor)
            if job.status == "queued":
                self._queue = [one for one in self._queue if one[0] != key]
                self._note(replace(job, status="stopped"))
            elif job.status == "running":
                self._note(replace(job, status="stopping"))
                if (running := self._running.get(key)) is not None:
                    running.stop()
            return self._jobs[key]

    def of(self, visitor: Visitor) -> list[Job]:
        """Those of this visitor, the newest first."""
        owner = owner_key(visitor)
        with self._changed:
            mine = [job for job in self._jobs.values() if job.owner == owner] if visitor.writable else []
        return sorted(mine, key=lambda job: -job.made)[:LISTED]

    def ahead(self, key: str) -> int:
        """How many jobs are run before this one."""
        with self._changed:
            waiting = [one for one, _ in self._queue]
            return len(self._running) + waiting.index(key) if key in waiting else 0

    def wait(self, seconds: float) -> None:
        """Until something changes, but no longer than this."""
        with self._changed:
            self._changed.wait(seconds)

    def close(self) -> None:
        """Stop all that runs; it can be gone on with."""
        with self._changed:
            self._queue.clear()
            for running in self._running.values():
                if running is not None:
                    running.stop()

    def _own(self, key: str, visitor: Visitor) -> Job:
        job = self._jobs.get(key)
        if job is None or job.owner != owner_key(visitor) or not visitor.writable:
            raise RequestError("there is no such merge of yours.")
        return job

    def _drop(self, jobs: Sequence[Job]) -> None:
        """Called with the lock, for jobs that neither wait nor run. What they left goes with an owner's last."""
        for job in jobs:
            del self._jobs[job.key]
            (self._folder / f"{job.key}.json").unlink(missing_ok=True)
        for owner in {job.owner for job in jobs}:
            self._forget_unless_needed(owner)

    def _forget_unless_needed(self, owner: str) -> None:
        if not any(job.owner == owner and (job.active or job.resumable) for job in self._jobs.values()):
            self._forget(owner)

    def _start_what_fits(self) -> None:
        """Called with the lock. The first in the queue is never passed by a smaller one."""
        while self._queue and len(self._running) < self._at_once:
            key, visitor = self._queue[0]
            reserved = sum(self._jobs[one].disk for one in self._running)
            if self._running and self._jobs[key].disk + reserved > self._free():
                return
            self._queue.pop(0)
            self._running[key] = None
            self._note(replace(self._jobs[key], status="running", stages=(), error=""))
            threading.Thread(target=self._work, args=(key, visitor), daemon=True).start()

    def _work(self, key: str, visitor: Visitor) -> None:
        """A job has ended once its worker is gone: before, none is started, dropped or gone on with in its place."""
        end: Event = {"event": "ended"}
        try:
            running = self._start(self._jobs[key], visitor)
            with self._changed:
                self._running[key] = running
                if self._jobs[key].status == "stopping":
                    running.stop()
            for event in running.events():
                with self._changed:
                    if (job := self._jobs[key].after(event)).active:
                        self._note(job)
                    else:
                        end = event
        except Exception as error:
            end = {"event": "error", "text": f"{type(error).__name__}: {error}"}
        with self._changed:
            del self._running[key]
            self._note(self._jobs[key].after(end))
            self._forget_unless_needed(self._jobs[key].owner)
            self._start_what_fits()
            self._changed.notify_all()

    def _note(self, job: Job) -> None:
        """Called with the lock. Bars are not written down."""
        before = self._jobs.get(job.key)
        self._jobs[job.key] = job
        if before is None or before.status != job.status:
            try:
                write_atomically(self._folder / f"{job.key}.json", json.dumps({**asdict(job), "stages": []}))
            except OSError as error:  # of a full disk: the merge itself may still be done
                log.warning("job %s is not written down: %s", job.key, error)
        self._changed.notify_all()


def _outdated(jobs: Iterable[Job], now: float) -> list[Job]:
    """Those that neither wait nor run and are too old, or too many: of one owner, or of all."""
    seen: Counter[str] = Counter()
    dropped = []
    for job in sorted((job for job in jobs if not job.active), key=lambda job: -job.made):
        if now - job.made > KEPT or seen[job.owner] >= LISTED or seen.total() >= KNOWN:
            dropped.append(job)
        else:
            seen[job.owner] += 1
    return dropped


def forget_home(work: Path) -> Callable[[str], object]:
    """Removes the home of a stranger: what their merges left to go on with."""
    return lambda owner: shutil.rmtree(home_of(owner, work), ignore_errors=True)


def merge_worker(work: Path) -> Callable[[Job, Visitor], Running]:
    """Starts workers whose homes are in this folder."""
    return lambda job, visitor: Call({"action": "merge", "recipe": job.order.recipe_fields()}, visitor, work)


def _read(path: Path) -> Job | None:
    """A job that an earlier server wrote down; None if it cannot be read."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        order = fields.pop("order")
        job = Job(**{
            **fields,
            "order": Order(**{**order, "finetuned": tuple(order["finetuned"])}),
            "stages": (),
            "said": tuple(fields["said"]),
        })  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return replace(job, status="interrupted", error=LEFT) if job.active else job
