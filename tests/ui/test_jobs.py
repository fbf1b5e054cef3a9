"""Jobs: bounded, on a disk that is not, by their owners, across the death of a worker or of the server."""

from __future__ import annotations

import errno
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_locstitch.errors import RequestError
from hf_locstitch.ui import jobs as jobs_module
from hf_locstitch.ui.calls import Event
from hf_locstitch.ui.jobs import Job, Jobs, forget_home
from hf_locstitch.ui.order import Order
from hf_locstitch.ui.visitor import Visitor, owner_key, worker_environment

ANN, BEN = Visitor("ann", "hf_secret_ann"), Visitor("ben", "hf_secret_ben")
DONE: Event = {"event": "result", "url": "http://hub/ann/merged", "commit": "c" * 40}
PROGRESS: Event = {"event": "progress", "stage": "merging", "done": 5, "total": 10, "unit": "B"}


class Worker:
    """A worker whose events a test gives."""

    def __init__(self) -> None:
        self.given: queue.Queue[Event | None] = queue.Queue()

    def events(self) -> Iterator[Event]:
        yield from iter(self.given.get, None)

    def give(self, *events: Event) -> None:
        for event in (*events, None):
            self.given.put(event)

    def stop(self) -> None:
        self.give({"event": "stopped"})


class Workers(dict[str, list[Worker]]):
    """By the target of their job; each start makes one more."""

    def start(self, job: Job, visitor: Visitor) -> Worker:
        worker = Worker()
        self.setdefault(job.order.push_to, []).append(worker)
        return worker


def order(target: str) -> Order:
    return Order("org/base", ("org/a",), push_to=target)


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def jobs(tmp_path: Path, workers: Workers) -> Jobs:
    return Jobs(tmp_path, workers.start, at_once=1, waiting=2, free=lambda: 100)


def test_a_merge_runs_and_tells_how_far_it_is(jobs: Jobs, workers: Workers) -> None:
    jobs.submit(order("ann/x"), ANN, 10)
    until(lambda: workers)
    workers["ann/x"][0].given.put(PROGRESS)
    until(lambda: jobs.of(ANN)[0].stages)
    assert (jobs.of(ANN)[0].stages[0].done, jobs.of(ANN)[0].status) == (5, "running")
    workers["ann/x"][0].give(DONE)
    until(lambda: jobs.of(ANN)[0].status == "done")
    assert jobs.of(ANN)[0].url == "http://hub/ann/merged"


def test_the_next_waits_until_one_is_done(jobs: Jobs, workers: Workers) -> None:
    jobs.submit(order("ann/x"), ANN, 10)
    jobs.submit(order("ben/y"), BEN, 10)
    until(lambda: "ann/x" in workers)
    assert jobs.of(BEN)[0].status == "queued" and jobs.ahead(jobs.of(BEN)[0].key) == 1 and "ben/y" not in workers
    workers["ann/x"][0].give(DONE)
    until(lambda: "ben/y" in workers)


def test_bounds_are_told(jobs: Jobs) -> None:
    with pytest.raises(RequestError, match="needs up to 101 B of disk, and only 100 B is free"):
        jobs.submit(order("ann/x"), ANN, 101)
    with pytest.raises(RequestError, match="sign in"):
        jobs.submit(order("ann/x"), Visitor(), 1)
    jobs.submit(order("ann/x"), ANN, 1)
    with pytest.raises(RequestError, match="still under way"):
        jobs.submit(order("ann/y"), ANN, 1)
    for name in ("ben", "cat"):
        jobs.submit(order(f"{name}/x"), Visitor(name, "t"), 1)
    with pytest.raises(RequestError, match="2 merges are waiting"):
        jobs.submit(order("dan/x"), Visitor("dan", "t"), 1)


def test_two_that_do_not_fit_the_disk_together_run_one_after_the_other(tmp_path: Path, workers: Workers) -> None:
    jobs = Jobs(tmp_path, workers.start, at_once=2, free=lambda: 100)
    jobs.submit(order("ann/x"), ANN, 60)
    jobs.submit(order("ben/y"), BEN, 60)
    until(lambda: "ann/x" in workers)
    assert jobs.of(BEN)[0].status == "queued"
    workers["ann/x"][0].give(DONE)
    until(lambda: "ben/y" in workers)


def test_the_same_merge_is_not_run_twice_at_once(jobs: Jobs, workers: Workers) -> None:
    first, second = jobs.submit(order("ann/x"), ANN, 1), jobs.submit(order("ann/x"), ANN, 1)
    assert first.key == second.key and len(jobs.of(ANN)) == 1


def test_a_job_is_its_owners_alone(jobs: Jobs) -> None:
    job = jobs.submit(order("ann/x"), ANN, 1)
    assert jobs.of(BEN) == [] and jobs.of(Visitor()) == []
    for act in (jobs.stop, jobs.resume):
        for stranger in (BEN, Visitor()):
            with pytest.raises(RequestError, match="no such merge"):
                act(job.key, stranger)


def test_a_merge_whose_worker_was_killed_goes_on(jobs: Jobs, workers: Workers) -> None:
    job = jobs.submit(order("ann/x"), ANN, 1)
    until(lambda: workers)
    workers["ann/x"][0].give(PROGRESS, {"event": "died", "status": -9})
    until(lambda: jobs.of(ANN)[0].status == "failed")
    assert "ended early (status -9)" in jobs.of(ANN)[0].error
    assert jobs.resume(job.key, ANN).attempts == 2
    until(lambda: len(workers["ann/x"]) == 2)
    workers["ann/x"][1].give(DONE)
    until(lambda: jobs.of(ANN)[0].status == "done")
    assert jobs.of(ANN)[0].error == "" and len(jobs.of(ANN)) == 1


def test_a_merge_is_stopped_while_it_waits_and_while_it_runs(jobs: Jobs, workers: Workers) -> None:
    running, waiting = jobs.submit(order("ann/x"), ANN, 1), jobs.submit(order("ben/y"), BEN, 1)
    assert jobs.stop(waiting.key, BEN).status == "stopped"
    until(lambda: workers)
    jobs.stop(running.key, ANN)
    until(lambda: jobs.of(ANN)[0].status == "stopped")
    assert "ben/y" not in workers


def test_a_merge_is_under_way_until_its_worker_has_ended(jobs: Jobs, workers: Workers) -> None:
    jobs.submit(order("ann/x"), ANN, 1)
    until(lambda: workers)
    worker = workers["ann/x"][0]
    worker.given.put({"event": "stopped"})
    until(worker.given.empty)
    time.sleep(0.05)
    with pytest.raises(RequestError, match="still under way"):
        jobs.submit(order("ann/y"), ANN, 1)
    worker.given.put(None)
    until(lambda: jobs.of(ANN)[0].resumable)
    jobs.submit(order("ann/y"), ANN, 1)
    until(lambda: "ann/y" in workers)


def test_what_a_dead_server_left_goes_on_with_the_token_of_that_moment(tmp_path: Path, workers: Workers) -> None:
    Jobs(tmp_path, workers.start).submit(order("ann/x"), ANN, 1)
    seen = []

    def start(job: Job, visitor: Visitor) -> Worker:
        seen.append(visitor.token)
        return workers.start(job, visitor)

    after = Jobs(tmp_path, start)
    (left,) = after.of(Visitor("ann", "hf_new"))
    assert left.status == "interrupted" and "server was stopped" in left.error
    after.resume(left.key, Visitor("ann", "hf_new"))
    until(lambda: seen == ["hf_new"])


def test_no_token_is_written_down(tmp_path: Path, jobs: Jobs, workers: Workers) -> None:
    jobs.submit(order("ann/x"), ANN, 1)
    until(lambda: workers)
    workers["ann/x"][0].give({"event": "error", "text": "no", "resumable": False})
    until(lambda: jobs.of(ANN)[0].status == "failed")
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any("hf_secret" in text for text in written) and "hf_secret" not in repr(ANN)


def test_old_jobs_and_too_many_are_known_no_more(tmp_path: Path, workers: Workers, monkeypatch: Any) -> None:
    monkeypatch.setattr(jobs_module, "LISTED", 2)
    forgotten: list[str] = []
    jobs = Jobs(tmp_path, workers.start, free=lambda: 100, forget=forgotten.append)
    for name in ("a", "b", "c", "d"):
        job = jobs.submit(order(f"ann/{name}"), ANN, 1)
        until(lambda target=f"ann/{name}": target in workers)
        workers[f"ann/{name}"][0].give(DONE)
        until(lambda key=job.key: not next(one for one in jobs.of(ANN) if one.key == key).active)
    jobs.submit(order("ben/y"), BEN, 1)
    assert [job.order.push_to for job in jobs.of(ANN)] == ["ann/d", "ann/c"]
    assert len([*tmp_path.glob("*.json")]) == 3 and not jobs.of(BEN)[0].resumable
    monkeypatch.setattr(jobs_module, "KEPT", -1)
    jobs.submit(order("cat/z"), Visitor("cat", "t"), 1)
    assert jobs.of(ANN) == [] and forgotten[-1] == owner_key(ANN) and len(jobs.of(BEN)) == 1


def test_a_strangers_next_merge_gives_up_the_one_that_was_stopped(tmp_path: Path, workers: Workers) -> None:
    forgotten: list[str] = []
    jobs = Jobs(tmp_path, workers.start, free=lambda: 100, forget=forgotten.append)
    jobs.stop(jobs.submit(order("ann/x"), ANN, 1).key, ANN)
    until(lambda: jobs.of(ANN)[0].resumable)
    jobs.resume(jobs.of(ANN)[0].key, ANN)
    assert forgotten == []  # what it goes on with
    until(lambda: len(workers["ann/x"]) == 2)
    jobs.stop(jobs.of(ANN)[0].key, ANN)
    until(lambda: jobs.of(ANN)[0].resumable)
    jobs.submit(order("ann/y"), ANN, 1)
    assert [job.order.push_to for job in jobs.of(ANN)] == ["ann/y"] and forgotten == [owner_key(ANN)]


def test_a_merge_has_ended_once_its_worker_is_gone(jobs: Jobs, workers: Workers) -> None:
    """Not with the worker's last word: a job that is dropped or gone on with then would still have a worker."""
    jobs.submit(order("ann/x"), ANN, 1)
    until(lambda: workers)
    given = workers["ann/x"][0].given
    given.put(DONE)
    given.put({"event": "warning", "text": "late"})
    until(given.empty)  # the later one was taken, so the other was dealt with
    assert jobs.of(ANN)[0].active
    given.put(None)
    until(lambda: jobs.of(ANN)[0].status == "done")


def test_a_full_disk_ends_no_merge(jobs: Jobs, workers: Workers, monkeypatch: Any, caplog: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs_module, "write_atomically", full)
    jobs.submit(order("ann/x"), ANN, 1)
    until(lambda: workers)
    workers["ann/x"][0].give(DONE)
    until(lambda: jobs.of(ANN)[0].status == "done")
    assert "No space left" in caplog.text


def test_a_home_is_removed_once_nothing_in_it_is_needed(tmp_path: Path, workers: Workers) -> None:
    homes = [Path(worker_environment({}, visitor, tmp_path)["HF_HOME"]) for visitor in (ANN, BEN)]
    for home in homes:
        (home / "work").mkdir(parents=True)
    jobs = Jobs(tmp_path / "jobs", workers.start, at_once=2, forget=forget_home(tmp_path))
    jobs.submit(order("ann/x"), ANN, 1)
    jobs.submit(order("ben/y"), BEN, 1)
    until(lambda: len(workers) == 2)
    workers["ben/y"][0].give({"event": "died", "status": -9})
    workers["ann/x"][0].give(DONE)
    until(lambda: not homes[0].exists() and jobs.of(BEN)[0].resumable)
    assert homes[1].exists()  # what the merge of the other goes on with


def test_a_file_that_is_no_job_is_left_alone(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "y.json").write_text('{"order": 1}')
    assert Jobs(tmp_path, workers.start).of(ANN) == []
