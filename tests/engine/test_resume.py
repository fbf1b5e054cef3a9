"""A killed merge, started again by the same command, ends in the same bytes; nothing of another merge is mixed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save, save_sharded
from helpers.runs import Killed, files_of

from hf_locstitch import Magnitude, merge_from_hub
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.errors import OutputError, WorkError
from hf_locstitch.localize import scan

SHAPES = {f"layers.{i}.w": (120, 90) for i in range(6)} | {"embed.w": (50, 90)}


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    base = random_state(0, torch.bfloat16, SHAPES)
    folders = [save_sharded(tmp_path / "base", base, lambda names: [[name] for name in names])]
    return folders + [save(tmp_path / f"ft{i}", finetune(base, i, 1e-2)) for i in range(2)]


@pytest.fixture
def expected(inputs: list[Path], tmp_path: Path) -> dict[str, str]:
    merge(inputs, tmp_path / "expected")
    return files_of(tmp_path / "expected")


def merge(inputs: list[Path], out: Path, density: float = 0.1, figures: bool = False) -> None:
    merge_from_hub(inputs[0], inputs[1:], out=out, localizer=Magnitude(density=density), figures=figures)


def partials(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob(".out.*.partial"))


KillAfter = Callable[..., None]


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> KillAfter:
    """Let the n-th call of a method, from 0, end the work; all calls pass again if no number is given."""
    originals: dict[tuple[type, str], Callable[..., object]] = {}

    def arrange(owner: type, name: str, calls: int | None = None, error: BaseException | None = None) -> None:
        original = originals.setdefault((owner, name), getattr(owner, name))
        count = iter(range(calls)) if calls is not None else None

        def method(*args: object, **kwargs: object) -> object:
            if count is not None and next(count, None) is None:
                raise error or Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    return arrange


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (scan.Scan, "_offer", 0),
        (scan.Scan, "_offer", 4),
        (ShardWriter, "_merge", 3),
        (ShardWriter, "write", 5),
        (WorkDir, "record", 2),
    ],
)
def test_a_cut_merge_goes_on(
    inputs: list[Path],
    expected: dict[str, str],
    tmp_path: Path,
    kill_after: KillAfter,
    owner: type,
    name: str,
    calls: int,
) -> None:
    kill_after(owner, name, calls)
    with pytest.raises(Killed):
        merge(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(partials(tmp_path)) == 1
    kill_after(owner, name)
    merge(inputs, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected and not partials(tmp_path)


def test_what_is_done_is_not_done_again(
    inputs: list[Path], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[int] = []
    written: list[str] = []
    offer, write = scan.Selection.offer, ShardWriter.write

    def count_offer(self, chunk, *args):  # type: ignore[no-untyped-def]
        offered.append(chunk.index)
        return offer(self, chunk, *args)

    def cut_write(self, shard, path):  # type: ignore[no-untyped-def]
        if len(written) == 4:
            written.append("cut")
            raise Killed
        written.append(shard.file)
        return write(self, shard, path)

    monkeypatch.setattr(scan.Selection, "offer", count_offer)
    monkeypatch.setattr(ShardWriter, "write", cut_write)
    with pytest.raises(Killed):
        merge(inputs, tmp_path / "out")
    before, shards = len(offered), written[:4]
    merge(inputs, tmp_path / "out")
    assert len(offered) == before
    assert not set(shards[:3]) & set(written[5:])
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("victim", ["ft0.0-of-1", "ft0.0-of-1.index", "shard"])
def test_damage_to_what_was_left_is_noticed(
    inputs: list[Path], expected: dict[str, str], tmp_path: Path, kill_after: KillAfter, victim: str
) -> None:
    kill_after(ShardWriter, "write", 4)
    with pytest.raises(Killed):
        merge(inputs, tmp_path / "out")
    folder = partials(tmp_path)[0]
    path = folder / "out" / "model-00001-of-00007.safetensors" if victim == "shard" else folder / "spill" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    kill_after(ShardWriter, "write")
    merge(inputs, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_another_merge_is_not_mixed_in(inputs: list[Path], tmp_path: Path, kill_after: KillAfter) -> None:
    kill_after(ShardWriter, "write", 4)
    with pytest.raises(Killed):
        merge(inputs, tmp_path / "out")
    left = partials(tmp_path)
    kill_after(ShardWriter, "write")
    merge(inputs, tmp_path / "out", density=0.2)
    assert partials(tmp_path) == left
    merge(inputs, tmp_path / "fresh", density=0.2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_changed_input_is_not_mixed_in(inputs: list[Path], tmp_path: Path, kill_after: KillAfter) -> None:
    kill_after(ShardWriter, "write", 4)
    with pytest.raises(Killed):
        merge(inputs, tmp_path / "out")
    kill_after(ShardWriter, "write")
    shard = inputs[1] / "model.safetensors"
    other = random_state(9, torch.bfloat16, SHAPES)
    shard.unlink()
    inputs[1].rename(tmp_path / "old")
    save(inputs[1], other)
    merge(inputs, tmp_path / "out")
    merge(inputs, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_full_disk(inputs: list[Path], expected: dict[str, str], tmp_path: Path, kill_after: KillAfter) -> None:
    kill_after(ShardWriter, "_merge", 3, OSError(28, "No space left on device"))
    with pytest.raises(WorkError, match=r"is full.*run the same command again"):
        merge(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kill_after(ShardWriter, "_merge")
    merge(inputs, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_a_finished_merge_is_recognised(inputs: list[Path], expected: dict[str, str], tmp_path: Path) -> None:
    """The same command again, after a kill between the last rename and the end."""
    merge(inputs, tmp_path / "out")
    manifest = (tmp_path / "out" / "locstitch.json").read_text()
    merge(inputs, tmp_path / "out")
    assert (tmp_path / "out" / "locstitch.json").read_text() == manifest
    with pytest.raises(OutputError):
        merge(inputs, tmp_path / "out", density=0.2)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        merge(inputs, tmp_path / "out")


def test_two_at_once(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShardWriter.write

    def meanwhile(self, shard, path):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(ShardWriter, "write", write)
        with pytest.raises(OutputError, match="another process is making the same merge"):
            merge(inputs, tmp_path / "out")
        return write(self, shard, path)

    monkeypatch.setattr(ShardWriter, "write", meanwhile)
    merge(inputs, tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_kill_minus_nine(inputs: list[Path], tmp_path: Path) -> None:
    """The real signal at several moments of the real command; the last run is left in peace. Figures and all."""
    merge(inputs, tmp_path / "expected", figures=True)
    command = [sys.executable, "-m", "hf_locstitch", "merge", "--base", str(inputs[0]), "--out", "out", "--quiet"]
    command += ["--ft", *map(str, inputs[1:])]
    path = [str(Path(__file__).parents[1] / "helpers" / "slowly"), *filter(None, [os.environ.get("PYTHONPATH")])]
    slow = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    for wait in (0.2, 0.6, 1.2):
        process = subprocess.Popen(command, cwd=tmp_path, env=slow, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not partials(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.communicate()
        assert not (tmp_path / "out").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected") and not partials(tmp_path)
    assert json.loads((tmp_path / "out" / "locstitch.json").read_text())["k"] == 6480
