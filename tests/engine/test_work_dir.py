"""What a folder of unfinished work says of shards, and of files that were verified."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hf_locstitch.engine.work_dir import ShardRecord, WorkDir
from hf_locstitch.runtime.processes import Processes

FILE = "model-00001-of-00002.safetensors"


def test_a_shard_is_finished_once_all_processes_have_verified_what_they_read(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.stage.mkdir()
    (work.stage / FILE).write_bytes(b"weights")
    shard = ShardRecord(hashlib.sha256(b"weights").hexdigest(), 7, [], [], processes=3)
    work.note_part(FILE, 2)
    work.record(FILE, shard)
    assert work.finished(FILE) is None
    work.note_part(FILE, 1)
    assert work.finished(FILE) == shard
    work.clear_stage()
    assert work.finished(FILE) == shard
    work.forget(FILE)  # it is written anew: nothing that was verified before counts
    work.record(FILE, shard)
    assert work.finished(FILE) is None
    work.clear_stage()
    assert not (work.stage / FILE).exists()


def test_what_any_of_so_many_processes_verified_counts_for_as_many(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    for rank in range(2):
        work.note_verified([("ft", f"{rank}.safetensors")], Processes(rank, 2))
    work.note_verified([("base", "0.safetensors")], Processes())
    assert work.verified(2) == {("ft", "0.safetensors"), ("ft", "1.safetensors")}
    assert work.verified(1) == {("base", "0.safetensors")} and not work.verified(3)
