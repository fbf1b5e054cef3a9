"""What a stopped merge left, damaged: done again where it is not whole, and never another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import finetune, random_state, save
from helpers.refits import SMALL
from helpers.runs import Killed, files_of, quick_merge

from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.runtime.journal import append_lines, read_lines, read_record, write_record

SHAPES = {f"layers.{i}.w": (40, 30) for i in range(4)} | {"embed.w": (20, 30)}


def flip(content: bytes) -> Iterator[bytes]:
    """One bit, at two places."""
    for place in {len(content) // 3, len(content) - 2} if len(content) > 2 else ():
        damaged = bytearray(content)
        damaged[place] ^= 4
        yield bytes(damaged)


DAMAGES: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "cut": lambda content: iter([content[: len(content) // 2]]),
    "emptied": lambda content: iter([b""]),
    "garbled": lambda content: iter([b"\xff{]\n" * (len(content) // 4 + 1)]),
    "flipped": flip,
}


def known(out: Path) -> tuple[Any, ...]:
    """All files, and the manifest but for the time."""
    record = json.loads((out / "locstitch.json").read_text())
    return files_of(out), {**record, "seconds": 0}


def each_damage_is_mended(merge: Callable[[Path], None], root: Path, damage: str, within: str = "") -> None:
    """Stop a merge late, and for every file it left: damage that, and start the merge again. within: what part."""
    merge(root / "due")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WorkDir, "record", stop_after(2, WorkDir.record))
        with pytest.raises(Killed):
            merge(root / "out")
    (partial,) = root.glob(".out.*.partial")
    left = {path: path.read_bytes() for path in sorted(partial.rglob("*")) if path.is_file() and not path.is_symlink()}
    assert len([path for path in left if path.suffix == ".done"]) >= 2
    shutil.move(partial, root / "kept")
    for path, content in ((path, left[path]) for path in left if path.is_relative_to(partial / within)):
        for damaged in DAMAGES[damage](content):
            shutil.copytree(root / "kept", partial, symlinks=True)
            path.write_bytes(damaged)
            merge(root / "out")
            assert known(root / "out") == known(root / "due"), path.relative_to(partial)
            shutil.rmtree(root / "out")


def stop_after(calls: int, method: Callable[..., None]) -> Callable[..., None]:
    count = iter(range(calls))

    def stopping(*args: Any) -> None:
        if next(count, None) is None:
            raise Killed
        method(*args)

    return stopping


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_merge(damage: str, tmp_path: Path) -> None:
    base = random_state(0, shapes=SHAPES)
    folders = [save(tmp_path / "base", base), *(save(tmp_path / f"ft{i}", finetune(base, i, 1e-2)) for i in range(2))]

    def merge(out: Path) -> None:
        quick_merge(folders[0], folders[1:], out=out, localizer={"density": 0.1}, shard_size=5000)

    each_damage_is_mended(merge, tmp_path, damage)


@pytest.mark.parametrize("kind", ["refit", "saliency"])
def test_with_data(kind: str, tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32, num_hidden_layers=1), tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", 8, seed=seed)) for seed in range(2)]
    how: dict[str, Any] = {"localizer": {"method": "saliency", "density": 0.1}}
    if kind == "refit":
        how = {"localizer": {"density": 0.1}, "stitch": {**SMALL, "inputs": 6, "held_out": 0.5, "lambdas": [0.1, 1.0]}}

    def merge(out: Path) -> None:
        few = ["*.mlp.*"]  # every kind of file is left, and few of each
        quick_merge(folders[0], folders[1:], out=out, data=data, include=few, shard_size=15_000, **how)

    each_damage_is_mended(merge, tmp_path, "flipped", within="spill")


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert read_record(path) is None
    write_record(path, {"a": [1, "é"]})
    assert read_record(path) == {"a": [1, "é"]}
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    assert read_record(path) is None
    lines = tmp_path / "lines"
    append_lines(lines, [("a", "b"), ("c", "d")])
    lines.write_bytes(lines.read_bytes()[:-4] + b"\n")
    append_lines(lines, [("e", "f")])
    assert list(read_lines(lines)) == [["a", "b"], ["e", "f"]]
