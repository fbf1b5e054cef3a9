"""What comparisons for the same folder left that were stopped, and whose grid has been changed since."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf_locstitch.comparison.report import FILE
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.runtime.locks import remove_locked, try_lock

MARK = "comparison"  # a file that tells the folder of a comparison from one of a merge
SCORES = "scores"  # a folder of files, named by all that the scores in them depend on
NAME = re.compile(r"(?P<near>\..*)\.[0-9a-f]{16}\.partial")  # as work_dir_beside has it


def take_over(work: WorkDir) -> None:
    """Move the scores of such comparisons to this one, and remove what else they left. work: open.

    Left alone are those that another process works in, and those that were finished but could not be moved to their
    place.
    """
    (work.folder / MARK).touch()
    for folder in _others(work.folder):
        if (folder / "out" / FILE).exists() or (lock := try_lock(folder / "lock")) is None:
            continue
        for file in (folder / SCORES).glob("*.json"):
            (work.folder / SCORES).mkdir(exist_ok=True)
            file.replace(work.folder / SCORES / file.name)
        remove_locked(folder, lock)


def _others(own: Path) -> Iterator[Path]:
    """Folders of other comparisons for the same output."""
    near = _near(own)
    for folder in own.parent.iterdir():
        if folder != own and _near(folder) == near and (folder / MARK).is_file():
            yield folder


def _near(folder: Path) -> str | None:
    found = NAME.fullmatch(folder.name)
    return found["near"] if found else None
