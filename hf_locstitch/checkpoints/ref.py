"""How users refer to a checkpoint: a folder, `org/name`, `org/name/subfolder`, or one safetensors file in any of these;
what is of a repo may end in `@revision`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from hf_locstitch.errors import RecipeError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")
FOLDER_PREFIXES = ("/", "./", "../", "~")
INSIDE = re.compile(r"\w[\w. +-]*(?:/\w[\w. +-]*)*")  # of a repo: a folder or a file
REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*")  # a commit, tag or branch, or refs/pr/N
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Ref:
    """Exactly one of folder and repo is set. revision: a branch, tag or commit of the repo, None for its head.

    path: of a folder in the repo, or of one safetensors file in either; empty for all of it.
    """

    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None
    path: str = ""

    @property
    def name(self) -> str:
        """The last part, which names the finetune unless the user does."""
        if self.path:
            return self.path.rpartition("/")[2].removesuffix(WEIGHTS)
        return self.folder.resolve().name if self.folder is not None else str(self.repo).rpartition("/")[2]


def is_written_as_path(text: str) -> bool:
    """Whether it can be no repo: /model, ./model, ../model, ~/model, .\\model, C:/model."""
    return text.startswith(FOLDER_PREFIXES) or "\\" in text or bool(PureWindowsPath(text).drive)


def could_be_repo(text: str) -> bool:
    """Whether a folder of this name hides a repo: it is org/name, not written as a path."""
    return "/" in text and not is_written_as_path(text) and REPO_ID.fullmatch(text) is not None


def expand_home(path: Path) -> Path:
    """`~` and `~user` as the folders they stand for. Raises RecipeError if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{path} names the home folder of an unknown user. Write the whole path.") from error


def parse_ref(text: str) -> Ref:
    """A folder that exists (or is written as a path) wins over a repo of that name, as in transformers.

    Raises RecipeError if the text is neither.
    """
    if is_written_as_path(text) or os.path.exists(text):
        place = expand_home(Path(text))
        one_file = place.suffix == WEIGHTS and not place.is_dir()
        return Ref(folder=place.parent, path=place.name) if one_file else Ref(folder=place)
    where, at, revision = text.partition("@")
    repo, path = _split(where)
    valid = REPO_ID.fullmatch(repo) and (INSIDE.fullmatch(path) if path else not where.endswith("/"))
    if not valid or (at and not REVISION.fullmatch(revision)):
        raise RecipeError(
            f"{text!r} is neither an existing folder nor a repo: write a path such as ./model, or org/name, "
            "org/name/subfolder, org/name@revision."
        )
    return Ref(repo=repo, revision=revision or None, path=path)


def _split(where: str) -> tuple[str, str]:
    """The repo, and what is named inside of it."""
    parts = where.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
