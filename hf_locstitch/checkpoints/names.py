"""Names that become paths: of masks, shards and other files. All come from strangers, so all are checked here.

A field of a pydantic model gets its check from its type: `SafeName`, `SafeFile`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

NAME = re.compile(r"[^\W_][\w.-]*")  # of a finetune: becomes masks/NAME.safetensors
WEIGHTS = ".safetensors"
LONGEST_NAME = 200  # bytes; a file system takes 255, and temporary files add a suffix
ON_WINDOWS = os.name == "nt"
# What Windows takes for a device, a stream or another file: part by part of a path.
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?|.*[<>:\"|?*].*|.*[. ]", re.IGNORECASE)
# What a merge writes itself; no input's file may take such a place. Compared without case, as some file systems do.
OWN_FILES = frozenset({"readme.md", "locstitch.yaml", "locstitch.json"})
OWN_FOLDERS = frozenset({"masks", "values", "figures"})


def safe_name(name: str) -> str:
    """The same name. Raises ValueError unless it may name a finetune and its mask's file."""
    if not NAME.fullmatch(name):
        raise ValueError(
            "must begin with a letter or digit and hold only letters, digits, '_', '-' and '.': it names a file"
        )
    if RESERVED.fullmatch(f"{name}{WEIGHTS}"):
        raise ValueError("is the name of a device on Windows, where no file can have it: it names a file")
    if (length := len(name.encode())) > LONGEST_NAME:
        raise ValueError(f"must be at most {LONGEST_NAME} bytes long, but has {length}: it names a file")
    return name


def safe_file(file: str) -> str:
    """The same path. Raises ValueError unless it is a plain relative path with "/" that stays inside its folder."""
    parts = file.split("/")
    if ON_WINDOWS and any(RESERVED.fullmatch(part) for part in parts):
        raise ValueError(f"{file!r} cannot be the name of a file on Windows")
    if any(part in ("", ".", "..") for part in parts) or "\\" in file or not file.isprintable():
        raise ValueError(f"{file!r} is not a plain path inside its folder")
    return file


def is_safe_file(file: str) -> bool:
    """Whether a file of this name is part of a checkpoint; other files of a folder or repo are never looked at."""
    try:
        return bool(safe_file(file))
    except ValueError:
        return False


def safe_shard(file: str) -> str:
    """The same path. Raises ValueError unless it may be a file of weights, beside all that a merge writes."""
    if not safe_file(file).endswith(WEIGHTS) or is_own(file):
        raise ValueError(f"{file!r} cannot be a shard of a model")
    return file


SafeName = Annotated[str, AfterValidator(safe_name)]
SafeFile = Annotated[str, AfterValidator(safe_file)]


def is_own(file: str) -> bool:
    """Whether a merge writes this place itself, or something in a folder of that name."""
    first = file.split("/")[0].casefold()
    return first in OWN_FILES or first in OWN_FOLDERS


def make_name(text: str, otherwise: str) -> str:
    """`text` if it is a safe name, else a safe one near it; `otherwise` if nothing of it can be used."""
    with suppress(ValueError):
        return safe_name(text)
    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text))
    cut = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    name = re.sub(r"^[\W_]+|-+$", "", cut)
    return otherwise if not name or RESERVED.fullmatch(f"{name}{WEIGHTS}") else name


def same_place(files: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that a file system without case takes for one, or that nest a file in a file."""
    seen: dict[PurePosixPath, str] = {}
    for file in files:
        seen_as = PurePosixPath(file.casefold())
        if seen_as in seen:
            return seen[seen_as], file
        seen[seen_as] = file
    for place, file in seen.items():
        for parent in place.parents:
            if parent in seen:
                return seen[parent], file
    return None
