"""Finding and loading lm-eval's tasks and their data sets."""

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
    """One hash of a folder of task files, so that an edited task does not use old cached scores."""
    if include_path is None:
        return None
    if not include_path.is_dir():
        raise RecipeError(f"--include-path {include_path} is not a folder. Name a folder with lm-eval task files.")
    digest = hashlib.sha256()
    for path in sorted(path for path in include_path.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(include_path).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def open_manager(specs: Sequence[TaskSpec], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks. Raises TaskError for unknown names, with the nearest known ones.

    Indexing its own 14,000 tasks takes ten seconds; they are skipped if `include_path` has all that are needed.
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
        f"lm-eval has no {plural} {', '.join(nearest(name) for name in names[:SHOWN])}. "
        "`lm-eval ls tasks` lists all tasks; --include-path DIR adds those in a folder."
    )


def load_task(manager: TaskManager, spec: TaskSpec) -> list[Task | Group]:
    """The task, group, or members of a tag, with data sets, fetched if need be. Raises TaskError or DownloadError."""
    try:
        loaded = explaining_data(spec.name, lambda: manager.load([spec.name]))
    except RuntimeError as error:  # for example a data set that is a script
        reason = " ".join(str(error).split())[:300]
        raise TaskError(f"the data set of task {spec.name} cannot be loaded: {reason}") from error
    groups = loaded.get("groups", {})
    return [groups[spec.name]] if spec.name in groups else list(loaded["tasks"].values())


def explaining_data(name: str, work: Callable[[], T]) -> T:
    """The result of `work`; errors about a task's data set become one clear paragraph."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

    try:
        return work()
    except DatasetNotFoundError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        login = "log in with `hf auth login` or set HF_TOKEN."
        raise TaskError(
            f"the data set of task {name} is not available: {reason}. "
            + (
                f"Request access on its page, then {login}"
                if "gated" in reason
                else f"Check the task's dataset_path; if it is private, {login}"
            )
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, TransportError, HfHubHTTPError) as error:
        raise DownloadError(
            f"the data set of task {name} could not be downloaded ({str(error).splitlines()[0]}). Run the same command "
            "again when the connection is back; finished scores are cached. To work offline, fetch the data set first."
        ) from error
    except FileNotFoundError as error:
        raise TaskError(f"a data file of task {name} was not found: {str(error).splitlines()[0]}") from error
    except (KeyError, ValueError) as error:
        raise WorkError(
            f"lm-eval failed on task {name} ({type(error).__name__}: {error}). Check the task file and its data set."
        ) from error
