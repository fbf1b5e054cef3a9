"""What comparisons for the same folder left that were stopped, and whose grid has been changed since."""

from __future__ import annotations

from hf_locstitch.comparison.report import FILE
from hf_locstitch.engine.work_dir import WorkDir, beside_it
from hf_locstitch.runtime.locks import remove_locked, try_lock

MARK = "comparison"  # a file that tells the folder of a comparison from one of a merge
SCORES = "scores"  # a folder of files, named by all that the scores in them depend on


def take_over(work: WorkDir) -> None:
    """Move the scores of such comparisons to this one, and remove what else they left. work: open.

    Left alone are those that another process works in, and those that were finished but could not be moved to their
    place.
    """
    (work.folder / MARK).touch()
    for folder in beside_it(work.folder):
        if not (folder / MARK).is_file() or (folder / "out" / FILE).exists():
            continue
        if (lock := try_lock(folder / "lock")) is None:
            continue
        for file in (folder / SCORES).glob("*.json"):
            (work.folder / SCORES).mkdir(exist_ok=True)
            file.replace(work.folder / SCORES / file.name)
        remove_locked(folder, lock)


def has_scores(work: WorkDir) -> bool:
    """Whether any merge was scored, by this process or by one before."""
    return any((work.folder / SCORES).glob("*.json"))


def remove_finished(work: WorkDir) -> None:
    """Remove what a comparison left that was killed after its result had come to its place."""
    if work.folder.exists() and not work.stage.exists() and (lock := try_lock(work.folder / "lock")) is not None:
        remove_locked(work.folder, lock)
