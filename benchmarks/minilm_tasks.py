"""Four-way text tasks out of Debian's package index: real sentences, real labels, no download.

Every Debian or Ubuntu machine has the index after `apt-get update`. A text is the one-line synopsis of a package,
its label comes from the section or the debtags somebody gave the package. The same index and the same seed give the
same examples.

What keeps the splits honest:

- a *source* package belongs to one split, for all tasks at once, so no binary of it is trained on and tested on;
- of equal synopses (letters and digits alone compared) one is kept, over all tasks and splits;
- of one source at most one example enters a task;
- a package that two classes of a task claim is left out of that task;
- the package's own name, its source's name and the words of `Task.strip` are cut from the text before anything else.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INDEX_FOLDER = Path("/var/lib/apt/lists")
APT_HELPER = "/usr/lib/apt/apt-helper"
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".lzma": lzma.open}
SPLITS = ("train", "validation", "test")
SHARE = {"train": 0.40, "validation": 0.15, "test": 0.45}  # of the source packages
FEWEST_WORDS = 2


class DataError(RuntimeError):
    """The index is missing or too small for a task; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One binary package. labels: its debtags (`use::editing`) and its section (`section::text`)."""

    name: str
    source: str
    labels: frozenset[str]
    text: str


@dataclass(frozen=True)
class Task:
    """A classification task as data.

    classes: class name -> labels, any of which puts a package into the class.
    within: labels, any of which a package must carry to be looked at; empty: all packages.
    strip: regular expressions (case is ignored) of words that would give the label away.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    within: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Texts and class numbers, in step."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """The three splits of one task."""

    task: Task
    train: Split
    validation: Split
    test: Split

    def counts(self) -> dict[str, list[int]]:
        """Examples a class, by split."""
        n = len(self.task.classes)
        return {name: [getattr(self, name).labels.count(c) for c in range(n)] for name in SPLITS}


TASKS: tuple[Task, ...] = (
    Task(
        "use",
        {k: (f"use::{k}",) for k in ("converting", "editing", "viewing", "checking")},
        strip=(r"conver\w+", r"edit\w*", r"view\w*", r"check\w*"),
    ),
    Task(
        "use2",
        {k: (f"use::{k}",) for k in ("monitor", "configuring", "organizing", "searching")},
        strip=(r"monitor\w*", r"config\w*", r"organi\w*", r"search\w*"),
    ),
    Task(
        "toolkit",
        {k: (f"uitoolkit::{k}",) for k in ("gtk", "qt", "ncurses", "sdl")},
        strip=(r"\w*gtk\w*", r"\w*qt\w*", r"\w*curses\w*", r"sdl\w*", r"kde\w*", r"gnome\w*", r"xfce\w*"),
    ),
    Task(
        "interface",
        {
            "command line": ("interface::commandline",),
            "graphical": ("interface::graphical", "interface::x11"),
            "text mode": ("interface::text-mode",),
            "daemon": ("interface::daemon",),
        },
        strip=(r"command[- ]?line", r"cli", r"graphical", r"gui", r"x11", r"text[- ]?mode", r"curses", r"daemon"),
    ),
    Task(
        "media",
        {
            "audio": ("works-with::audio",),
            "image": ("works-with::image",),
            "mail": ("works-with::mail",),
            "text": ("works-with::text",),
        },
        strip=(r"audio", r"image\w*", r"e?-?mail\w*", r"text\w*"),
    ),
    Task(
        "language",
        {"perl": ("section::perl",), "python": ("section::python",), "ruby": ("section::ruby",), "haskell": ("section::haskell",)},
        strip=(r"perl\S*", r"python\S*", r"ruby\S*", r"haskell\S*", r"gems?", r"modules?", r"librar\w+", r"\S+::\S+"),
    ),
    Task(
        "language2",
        {"java": ("section::java",), "javascript": ("section::javascript",), "golang": ("section::golang",), "rust": ("section::rust",)},
        strip=(r"java\S*", r"node\S*", r"js", r"go\w*", r"rust\S*", r"librar\w+"),
    ),
    Task(
        "role",
        {
            "program": ("role::program",),
            "library": ("role::shared-lib",),
            "plugin": ("role::plugin",),
            "data": ("role::app-data", "role::data"),
        },
        strip=(r"librar\w+", r"shared", r"runtime", r"plug-?ins?", r"data", r"files?", r"program\w*", r"modules?"),
    ),
    Task(
        "area",
        {k: (f"section::{k}",) for k in ("admin", "net", "utils", "devel")},
    ),
    Task(
        "desk",
        {k: (f"section::{k}",) for k in ("graphics", "sound", "text", "x11")},
    ),
    Task(
        "science",
        {"biology": ("field::biology",), "mathematics": ("field::mathematics", "section::math"), "statistics": ("section::gnu-r",), "other": ("section::electronics","section::hamradio",)},
    ),
    Task(
        "libs",
        {k: (f"section::{k}",) for k in ("libs", "science", "math", "gnu-r")},
    ),
    Task(
        "written",
        {"c": ("implemented-in::c",), "c++": ("implemented-in::c++",), "python": ("implemented-in::python",), "perl": ("implemented-in::perl",)},
        within=("role::program",),
        strip=(r"perl\S*", r"python\S*", r"c\+\+\S*", r"c"),
    ),
    Task(
        "network",
        {"server": ("network::server",), "client": ("network::client",), "monitor": ("use::monitor",), "configuration": ("use::configuring",)},
        strip=(r"server\w*", r"client\w*", r"monitor\w*", r"config\w*"),
    ),
)


def read_index(path: Path) -> str:
    """Text of one index file, however apt keeps it (plain, gz, xz, or, through apt's own helper, lz4 and zstd)."""
    packing = path.name.rpartition("_Packages")[2]
    opener = OPENERS.get(packing)
    if opener is not None:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    helper = shutil.which(APT_HELPER)
    if helper is None:
        raise DataError(f"{path} is packed as {packing}, and {APT_HELPER} that could read it is not there")
    return subprocess.run([helper, "cat-file", str(path)], check=True, capture_output=True).stdout.decode("utf-8")


def stanzas(index: str) -> Iterator[dict[str, str]]:
    """The fields of each package; continuation lines are joined by a space."""
    for block in index.split("\n\n"):
        joined = re.sub(r"\n[ \t]+", " ", block)
        fields = dict(line.split(": ", 1) for line in joined.splitlines() if ": " in line)
        if "Package" in fields:
            yield fields


def to_package(fields: Mapping[str, str]) -> Package:
    labels = {tag.strip() for tag in fields.get("Tag", "").split(",")} - {""}
    section = fields.get("Section", "").rsplit("/", 1)[-1]
    source = fields.get("Source", fields["Package"]).split(" ")[0]
    return Package(fields["Package"], source, frozenset(labels | {f"section::{section}"}), fields.get("Description", ""))


def normal_form(text: str) -> str:
    """What two synopses are compared by."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def load_packages(folder: Path = INDEX_FOLDER) -> list[Package]:
    """All packages of the index, by name, one for each synopsis. Raises DataError if there is no index."""
    files = sorted(p for p in folder.glob("*_Packages*") if p.is_file() and not p.name.endswith(".diff_Index"))
    if not files:
        raise DataError(f"no package index under {folder}: run `apt-get update` on a Debian or Ubuntu machine first")
    by_name: dict[str, Package] = {}
    for file in files:
        for fields in stanzas(read_index(file)):
            by_name.setdefault(fields["Package"], to_package(fields))
    by_text = {normal_form(p.text): p for _, p in sorted(by_name.items(), reverse=True)}
    return sorted((p for text, p in by_text.items() if text), key=lambda p: p.name)


def strip_words(text: str, patterns: Iterable[str]) -> str:
    for pattern in patterns:
        text = re.sub(rf"(?<![\w])(?:{pattern})(?![\w])", " ", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip(" -,:;.")


def split_of(source: str, seed: int) -> str:
    """Which split a source package belongs to, whatever the task."""
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for name in SPLITS:
        point -= SHARE[name]
        if point < 0:
            return name
    return SPLITS[-1]


def class_of(package: Package, task: Task) -> int | None:
    """Class number, or None if no class or more than one claims the package."""
    if task.within and package.labels.isdisjoint(task.within):
        return None
    hits = [i for i, labels in enumerate(task.classes.values()) if not package.labels.isdisjoint(labels)]
    return hits[0] if len(hits) == 1 else None


def build_task(packages: Sequence[Package], task: Task, seed: int, shots: int, held_out: int, tested: int) -> TaskData:
    """Draw the splits: `shots` training, at most `held_out` validation and `tested` test examples a class."""
    pool: dict[tuple[str, int], list[str]] = {(s, c): [] for s in SPLITS for c in range(len(task.classes))}
    seen: set[str] = set()
    shuffled = list(packages)
    random.Random(f"{seed}:{task.name}").shuffle(shuffled)
    for package in shuffled:
        label = class_of(package, task)
        if label is None or package.source in seen:
            continue
        names = (re.escape(n) for n in {package.name, package.source})
        text = strip_words(package.text, (*names, *task.strip))
        if len(normal_form(text).split()) < FEWEST_WORDS or normal_form(text) in seen:
            continue
        seen |= {package.source, normal_form(text)}
        pool[split_of(package.source, seed), label].append(text)
    wanted = {"train": shots, "validation": held_out, "test": tested}
    short = [f"{name} {c}: {len(texts)}" for (name, c), texts in pool.items() if name == "train" and len(texts) < shots]
    if short:
        raise DataError(f"task {task.name} needs {shots} training examples a class; the index has {'; '.join(short)}")
    splits = {}
    for name in SPLITS:
        pairs = [(t, c) for c in range(len(task.classes)) for t in pool[name, c][: wanted[name]]]
        splits[name] = Split([t for t, _ in pairs], [c for _, c in pairs])
    return TaskData(task, splits["train"], splits["validation"], splits["test"])
