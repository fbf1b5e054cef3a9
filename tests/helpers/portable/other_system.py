"""Makes this process resemble one on Windows, as far as Linux can: HF_LOCSTITCH_TEST_PORTABLE=1 asks for it.

What only POSIX has is hidden from programs (`HIDDEN`), a user may make no symbolic links, and a file that is open or
mapped can be neither renamed nor deleted, nor a folder with such a file be renamed. A folder is not renamed onto one
that exists. Everything that follows from this is asked of the files that this process itself holds open.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

ASKED = "HF_LOCSTITCH_TEST_PORTABLE"
HIDDEN = {
    os: "pread preadv pwrite pwritev posix_fallocate posix_fadvise sched_getaffinity mkfifo nice getloadavg",
    signal: "SIGHUP SIGBUS pthread_sigmask sigwait pause alarm setitimer",
}
ABSENT = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
# Libraries that have another way on Windows, and choose it by the system's name.
USERS = (
    "filelock._unix psutil subprocess multiprocessing.util tempfile getpass tarfile pathlib asyncio torch "
    "huggingface_hub.utils._terminal portalocker"
)


def resemble() -> None:
    """From now on in this process. To be called before hf_locstitch is imported."""
    for name in USERS.split():
        with contextlib.suppress(ModuleNotFoundError):  # what an extra installs
            importlib.import_module(name)
    for module, names in HIDDEN.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for name in ("unlink", "remove"):
        setattr(os, name, _unless_open(getattr(os, name), 1, "delete"))
    for name, paths in (("rename", 1), ("replace", 2)):  # what is there is not renamed onto, open or not
        setattr(os, name, _unless_open(_onto(getattr(os, name), name), paths, name))
    os.symlink = _no_privilege  # type: ignore[assignment]


def _unless_open(function: Any, paths: int, what: str) -> Any:
    def call(*args: Any, **named: Any) -> Any:
        for path in args[:paths]:
            if held := open_in(Path(os.fsdecode(path))):
                raise PermissionError(errno.EACCES, f"cannot {what}: a file is open ({held})", os.fsdecode(path))
        return function(*args, **named)

    return call


def _onto(function: Any, name: str) -> Any:
    def call(source: Any, target: Any) -> Any:
        if os.path.isdir(source) and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(source))
        if name == "rename" and os.path.lexists(target) and not os.path.samefile(source, target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(source))
        return function(source, target)

    return call


def _no_privilege(source: Any, target: Any, *_: Any, **__: Any) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(source))
    raise OSError(errno.EINVAL, "A required privilege is not held by the client", os.fsdecode(source))


def open_in(path: Path) -> str | None:
    """The path, or one below it, if this process holds it open or mapped."""
    place = os.path.realpath(path)
    is_folder = os.path.isdir(place)
    for held in _held():
        if held == place or (is_folder and held.startswith(place + "/")):
            return held
    return None


def _held() -> set[str]:
    found: set[str] = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            link = f"/proc/self/fd/{number}"
            if stat.S_ISREG(os.stat(link).st_mode):
                found.add(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith(b"/"):
                found.add(os.fsdecode(fields[5].rstrip(b"\n")))
    return found
