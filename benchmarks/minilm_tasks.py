"""Four-way text tasks out of Debian's package index: real sentences, real labels, nothing to download.

A Debian machine has the index after `apt-get update`. A text is the one-line synopsis of a package; its
label comes from the section or the debtags that people gave the package. The same index and the same seed give the
same examples.

What keeps the splits honest:

- a *source* package, with its other versions, belongs to one split, for all tasks at once: no expert has seen a
  sister of what it or another is tested on;
- of synopses with the same letters one is kept, over all tasks and splits;
- of one source and its versions, at most one example enters a task;
- a package that two classes of a task claim is left out of that task;
- the package's own name, its source's name and the words of `Task.strip` are cut out of the text.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FOLDER = Path("/var/lib/apt/lists")
APT_HELPER = Path("/usr/lib/apt/apt-helper")  # reads whatever apt writes, lz4 and zstd included
OPENERS: Mapping[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
SPLITS = ("train", "validation", "test")
SHARES = (0.40, 0.15, 0.45)  # of the source packages
FEWEST_WORDS = 3
NO_CONTENT = re.compile(r"\b(transition(al)?|dummy|metapackage|virtual package)\b", re.IGNORECASE)


class DataError(RuntimeError):
    """The index is missing, or too small for a task; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One binary package. marks: its debtags (`use::editing`) and its section (`section::text`)."""

    name: str
    source: str
    marks: frozenset[str]
    text: str


@dataclass(frozen=True)
class Class:
    """A class of a task: a package with any of the marks belongs to it. description: what a zero-shot head embeds."""

    name: str
    description: str
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A classification task as data. strip: regular expressions (case is ignored) of words that give a label away."""

    name: str
    classes: tuple[Class, ...]
    strip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Texts and their class numbers, in step."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """The three splits of a task."""

    task: Task
    train: Split
    validation: Split
    test: Split

    def counts(self) -> dict[str, list[int]]:
        """Examples of each class, by split."""
        numbers = range(len(self.task.classes))
        return {name: [getattr(self, name).labels.count(c) for c in numbers] for name in SPLITS}


LANGUAGES = (
    r"\S*(perl|python|ruby|haskell|php|ocaml|lisp|golang|javascript)\S*",
    r"(java|rust|node|ghc)\S*",
    r"\S+(::|\.js)\S*",
    r"(go|gnu|r|js|py|cl|cpan|cran|pypi|hackage|pecl|pear|gems?|crates?|cargo|quicklisp|asdf|emacs|elpa)",
)


def _section(name: str, description: str, *sections: str) -> Class:
    return Class(name, description, tuple(f"section::{s}" for s in sections or (name,)))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "ecosystem-a",
            (
                _section("perl", "a Perl module"),
                _section("php", "a PHP library"),
                _section("haskell", "a Haskell library"),
                _section("ocaml", "an OCaml library"),
            ),
            strip=LANGUAGES,
        ),
        Task(
            "ecosystem-b",
            (
                _section("go", "a Go package", "golang"),
                _section("rust", "a Rust crate"),
                _section("lisp", "Lisp code"),
                _section("r", "statistics with R", "gnu-r"),
            ),
            strip=LANGUAGES,
        ),
        Task(
            "role",
            (
                Class("program", "an application to be run", ("role::program",)),
                Class("library", "a shared library", ("role::shared-lib",)),
                Class("plugin", "a plugin that extends an application", ("role::plugin",)),
                Class("data", "data files", ("role::data", "role::app-data")),
            ),
            strip=(r"(shared )?librar\w+", r"plug-?ins?", r"data", r"program\w*", r"applications?"),
        ),
        Task(
            "use",
            (
                Class("converting", "converts between formats", ("use::converting",)),
                Class("editing", "edits files", ("use::editing",)),
                Class("viewing", "displays and views", ("use::viewing",)),
                Class("checking", "checks and verifies", ("use::checking",)),
            ),
            strip=(r"conver\w+", r"edit\w*", r"view\w*", r"check\w*"),
        ),
        Task(
            "trade",
            (
                _section("admin", "system administration"),
                _section("devel", "tools for software development"),
                _section("editors", "text editors"),
                _section("interpreters", "interpreters of programming languages"),
            ),
            strip=(r"admin\w*", r"develop\w*", r"edit\w*", r"interpret\w*"),
        ),
        Task(
            "ecosystem-c",
            (
                _section("python", "a Python module"),
                _section("ruby", "a Ruby gem"),
                _section("javascript", "a JavaScript module"),
                _section("java", "a Java library"),
            ),
            strip=LANGUAGES,
        ),
        Task(
            "interface",
            (
                Class("command line", "a command line tool", ("interface::commandline",)),
                Class("graphical", "a graphical application", ("interface::graphical", "interface::x11")),
                Class("text mode", "a full-screen terminal application", ("interface::text-mode",)),
                Class("daemon", "a background service", ("interface::daemon",)),
            ),
            strip=(r"command[- ]?line", r"cli", r"graphical", r"gui", r"x11", r"text[- ]?(mode|based)", r"daemons?"),
        ),
        Task(
            "medium",
            (
                Class("audio", "sound and music", ("works-with::audio",)),
                Class("image", "pictures and graphics", ("works-with::image",)),
                Class("mail", "electronic mail", ("works-with::mail",)),
                Class("text", "text and documents", ("works-with::text",)),
            ),
            strip=(r"audio", r"images?", r"e?-?mails?", r"texts?"),
        ),
    )
}


def index_files(folder: Path = INDEX_FOLDER) -> list[Path]:
    """The index files apt has fetched. Raises DataError if there are none."""
    files = sorted(p for p in folder.glob("*_Packages*") if p.is_file())
    if not files:
        raise DataError(f"no package index in {folder}: run `apt-get update` on a Debian machine first")
    return files


def read_index(path: Path) -> str:
    """Text of one index file, plain or packed."""
    packing = path.name.rpartition("_Packages")[2]
    if packing in OPENERS:
        with OPENERS[packing](path, "rt", encoding="utf-8") as file:
            return file.read()
    if not APT_HELPER.exists():
        raise DataError(f"{path} is packed as {packing}, and {APT_HELPER}, which reads that, is missing")
    command = [str(APT_HELPER), "cat-file", str(path)]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8")


def stanzas(index: str) -> Iterator[dict[str, str]]:
    """The fields of each package; only the first line of a description, continued lines of other fields joined."""
    for block in index.split("\n\n"):
        fields: dict[str, str] = {}
        last = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                if last != "Description":
                    fields[last] = f"{fields.get(last, '')} {line.strip()}"
            else:
                last, _, value = line.partition(":")
                fields[last] = value.strip()
        if "Package" in fields:
            yield fields


def to_package(fields: Mapping[str, str]) -> Package:
    """A package of the index's fields."""
    marks = {tag.strip() for tag in fields.get("Tag", "").split(",")} - {""}
    marks.add("section::" + fields.get("Section", "").rpartition("/")[2])
    source = (fields.get("Source") or fields["Package"]).split(" ")[0]
    return Package(fields["Package"], source, frozenset(marks), fields.get("Description", ""))


def normal_form(text: str) -> str:
    """What two synopses are compared by: their letters, so that versions of one thing are one."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def family(source: str) -> str:
    """Name of a source package up to its first digit: gcc-11-cross and gcc-12 are gcc."""
    return re.split(r"[-.]*\d", source, maxsplit=1)[0] or source


def load_packages(folder: Path = INDEX_FOLDER) -> list[Package]:
    """The packages of the index by name; of those with one synopsis, the first. Raises DataError without an index."""
    by_name: dict[str, Package] = {}
    for file in index_files(folder):
        for fields in stanzas(read_index(file)):
            by_name.setdefault(fields["Package"], to_package(fields))
    by_text: dict[str, Package] = {}
    for _, package in sorted(by_name.items()):
        if not NO_CONTENT.search(package.text):
            by_text.setdefault(normal_form(package.text), package)
    by_text.pop("", None)
    return list(by_text.values())


def fingerprint(packages: Iterable[Package]) -> str:
    """Short hash of all that the tasks are made of, to tell two snapshots of the index apart."""
    lines = (f"{p.name}\t{p.source}\t{','.join(sorted(p.marks))}\t{p.text}\n" for p in packages)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def strip_words(text: str, patterns: Iterable[str]) -> str:
    """The text without the whole words that a pattern matches."""
    for pattern in patterns:
        text = re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"\([\s,/-]*\)", " ", text)
    return re.sub(r"\s+", " ", text).strip(" -,:;./")


def split_of(source: str, seed: int) -> str:
    """Which split a source package belongs to, in every task."""
    digest = hashlib.sha256(f"{seed}:{family(source)}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    bound = 0.0
    for name, share in zip(SPLITS, SHARES, strict=True):
        bound += share
        if point < bound:
            return name
    return SPLITS[-1]


def class_of(package: Package, task: Task) -> int | None:
    """Class number; None if no class claims the package or more than one does."""
    claims = [i for i, c in enumerate(task.classes) if not package.marks.isdisjoint(c.marks)]
    return claims[0] if len(claims) == 1 else None


def candidates(packages: Sequence[Package], task: Task, seed: int) -> Iterator[tuple[str, int, str]]:
    """(split, class number, text) of every package that may enter the task, in a random order."""
    shuffled = list(packages)
    random.Random(f"{seed}:{task.name}").shuffle(shuffled)
    families: set[str] = set()
    texts: set[str] = set()
    for package in shuffled:
        label = class_of(package, task)
        if label is None or family(package.source) in families:
            continue
        names = sorted({package.name, package.source}, key=len, reverse=True)
        text = strip_words(package.text, (*map(re.escape, names), *task.strip))
        form = normal_form(text)
        if len(form.split()) >= FEWEST_WORDS and form not in texts:
            families.add(family(package.source))
            texts.add(form)
            yield split_of(package.source, seed), label, text


def build_task(
    packages: Sequence[Package], task: Task, seed: int, *, train: int = 64, validation: int = 40, test: int = 120
) -> TaskData:
    """Draw the splits: `train` examples a class, at most `validation` and `test`. Raises DataError if too few."""
    pools: dict[str, list[list[str]]] = {name: [[] for _ in task.classes] for name in SPLITS}
    for split, label, text in candidates(packages, task, seed):
        pools[split][label].append(text)
    short = [f"{c.name} {len(p)}" for c, p in zip(task.classes, pools["train"], strict=True) if len(p) < train]
    if short:
        raise DataError(f"task {task.name} needs {train} training examples a class, but the index gives {short}")
    splits = [_draw(pools[n], limit) for n, limit in zip(SPLITS, (train, validation, test), strict=True)]
    return TaskData(task, *splits)


def _draw(pools: Sequence[Sequence[str]], limit: int) -> Split:
    pairs = [(text, label) for label, pool in enumerate(pools) for text in pool[:limit]]
    return Split([text for text, _ in pairs], [label for _, label in pairs])
