"""What a stopped comparison left is of use to the next one for the same folder, whatever its grid, or removed."""

from __future__ import annotations

from pathlib import Path

from hf_locstitch.comparison.leftovers import MARK, SCORES, remove_finished, take_over
from hf_locstitch.engine.work_dir import WorkDir, work_dir_beside
from hf_locstitch.runtime.locks import try_lock


def stopped(out: Path, fingerprint: str, *files: str, mark: bool = True) -> WorkDir:
    work = work_dir_beside(out, fingerprint)
    for file in (*files, *([MARK] if mark else ())):
        (work.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (work.folder / file).write_text(fingerprint)
    return work


def test_scores_are_taken_over_and_the_rest_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "compared"
    older = stopped(out, "a" * 64, f"{SCORES}/one.json", "spill/scans/scan/positions")
    merge = stopped(out, "b" * 64, "out/model.safetensors", mark=False)
    finished = stopped(out, "c" * 64, "out/comparison.json")
    elsewhere = stopped(tmp_path / "compared.2", "d" * 64, f"{SCORES}/four.json")
    running = stopped(out, "e" * 64, f"{SCORES}/five.json")
    own = stopped(out, "f" * 64, f"{SCORES}/two.json", mark=False)
    lock = try_lock(running.folder / "lock")
    assert lock is not None
    take_over(own)
    lock.release()
    assert not older.folder.exists()
    assert {path.name for path in (own.folder / SCORES).iterdir()} == {"one.json", "two.json"}
    assert all(work.folder.exists() for work in (merge, finished, elsewhere, running))
    take_over(own)
    assert not running.folder.exists() and (own.folder / SCORES / "five.json").read_text() == "e" * 64


def test_what_a_killed_process_left_of_a_finished_one_is_removed(tmp_path: Path) -> None:
    finished = stopped(tmp_path / "compared", "a" * 64, "lock", "spill/scans/scan/positions")
    stopping = stopped(tmp_path / "compared", "b" * 64, "out/README.md")
    for work in (finished, stopping):
        remove_finished(work)
    assert not finished.folder.exists() and stopping.folder.exists()
