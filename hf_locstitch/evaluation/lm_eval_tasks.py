"""Which tasks are run, with how many shots, and where lm-eval has them from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_locstitch.errors import DownloadError, RecipeError, TaskError, WorkError
from hf_locstitch.tasks.benchmarks import TaskSpec

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

T = TypeVar("T")
SHOWN = 5


def digest_of(include_path: Path | None) -> str | None:
    """One hash for a folder of task files, so that scores of an edited task are not taken for its own."""
    if include_path is None:
        return None
    if not include_path.is_dir():
        raise RecipeError(f"--include-path {include_path} is no folder. Name one that holds lm-eval's task files.")
    digest = hashlib.sha256()
    for path in sorted(path for path in include_path.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(include_path).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def open_manager(specs: Sequence[TaskSpec], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks. Raises TaskError for names that it does not have, with the nearest ones.

    Its own fourteen thousand tasks take it ten seconds to find; they are left out if `include_path` has all.
    """
    from lm_eval.tasks import TaskManager

    names = [spec.name for spec in specs]
    own = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    if own is not None and set(names) <= set(own.all_subtasks):
        return own
    known = {*_builtin().all_tasks, *(own.all_tasks if own else ())}
    if unknown := [name for name in names if name not in known]:
        raise TaskError(_unknown(unknown, sorted(known)))
    return _builtin() if own is None else TaskManager(include_path=str(include_path))


@lru_cache(1)
def _builtin() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(names: Sequence[str], known: Sequence[str]) -> str:
    def nearest(name: str) -> str:
        near = get_close_matches(name, known, n=3) or [task for task in known if name in task][:3]
        return f"{name!r}" + (f" (did you mean {', '.join(near)}?)" if near else "")

    plural = "tasks" if len(names) > 1 else "task"
    return (
        f"lm-eval knows no {plural} {', '.join(nearest(name) for name in names[:SHOWN])}. "
        "`lm-eval ls tasks` lists all; --include-path DIR adds those of a folder."
    )


def load_task(manager: TaskManager, spec: TaskSpec) -> list[Task | Group]:
    """The task, group, or members of a tag, with data sets, fetched if need be. Raises TaskError or DownloadError."""
    try:
        loaded = explaining_data(spec.name, lambda: manager.load([spec.name]))
    except RuntimeError as error:  # a data set that is a script, for one
        said = " ".join(str(error).split())[:300]
        raise TaskError(f"the data set of task {spec.name} cannot be loaded: {said}") from error
    groups = loaded.get("groups", {})
    return [groups[spec.name]] if spec.name in groups else list(loaded["tasks"].values())


def explaining_data(name: str, work: Callable[[], T]) -> T:
    """The work's result; what goes wrong with a task's data set becomes one paragraph."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

    try:
        return work()
    except DatasetNotFoundError as error:
        said = str(error).splitlines()[0].rstrip(".")
        cure = "Ask for access on its page, then log in with `hf auth login` or set HF_TOKEN."
        raise TaskError(
            f"the data set of task {name} cannot be had: {said}. "
            + (cure if "gated" in said else f"Check the task's dataset_path; if it is private, {cure[32:]}")
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, TransportError, HfHubHTTPError) as error:
        raise DownloadError(
            f"the data set of task {name} could not be fetched ({str(error).splitlines()[0]}). Give the same command "
            "again when the connection is back; what was measured is kept. Without network, a data set must have been "
            "fetched before."
        ) from error
    except FileNotFoundError as error:
        raise TaskError(f"the data of task {name} is not there: {str(error).splitlines()[0]}") from error
    except (KeyError, ValueError) as error:
        raise WorkError(
            f"lm-eval fails at task {name} ({type(error).__name__}: {error}). Check the task's file and its data set."
        ) from error
