"""Merges of what lies in the Hub cache: it is read before it is checked, and nothing of a damaged file comes out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.runs import files_of, quick_merge

from hf_locstitch import verify
from hf_locstitch.checkpoints import following_hash, hashes, known_hashes
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.engine import run
from hf_locstitch.errors import IntegrityError
from hf_locstitch.localize.scan import Scan
from loopback_hub import LoopbackHub

FILE = "model.safetensors"
SHAPES = {f"layers.{i}.w": (120, 90) for i in range(6)} | {"embed.w": (50, 90)}


@pytest.fixture
def repos(home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base and two finetunes, in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    base, names = random_state(0, torch.bfloat16, SHAPES), []
    for number, state in enumerate([base, finetune(base, 1, 1e-2), finetune(base, 2, 1e-2)]):
        folder = save(tmp_path / "in" / str(number), state)
        names.append(f"demo/{uuid4().hex}")
        home_hub.add_repo(names[-1], {path.name: path for path in folder.iterdir()})
        source = HubSource(names[-1], None)
        for file in source.files:
            source.fetch(file)
    return names


def merge(repos: Sequence[str], out: Path) -> dict[str, str]:
    quick_merge(repos[0], repos[1:], out=out, names=["a", "b"])
    return files_of(out)


def blob(repo: str) -> Path:
    path = HubSource(repo, None).cached(FILE)
    assert path is not None
    return path.resolve()


def damage(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("content", [b"\x55", b"\x8f\x7f" * 4000], ids=["a byte", "NaN"])
def test_a_damaged_blob(repos: list[str], victim: int, content: bytes, tmp_path: Path) -> None:
    """It is found before anything is made of it, however it shows, and the same command again fetches it."""
    expected = merge(repos, tmp_path / "expected")
    path = blob(repos[victim])
    damage(path, path.stat().st_size // 2 // 4 * 4, content)
    with pytest.raises(IntegrityError, match=rf"{FILE} of {repos[victim]}.*was damaged in the cache.*again"):
        merge(repos, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not path.exists()
    assert merge(repos, tmp_path / "out") == expected


def test_a_damaged_blob_offline(repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge(repos, tmp_path / "expected")
    path = blob(repos[1])
    whole = path.read_bytes()
    damage(path, len(whole) - 1, b"\x55")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(IntegrityError, match=rf"{FILE} of {repos[1]}.*damaged in the cache.*Unset HF_HUB_OFFLINE"):
        merge(repos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(whole)
    assert merge(repos, tmp_path / "out") == expected


def test_what_a_killed_run_made_of_a_damaged_blob(
    repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mended meanwhile, unseen: neither its masks nor its shards are believed."""
    expected = merge(repos, tmp_path / "expected")
    path = blob(repos[1])
    whole = path.read_bytes()
    damage(path, len(whole) // 2, b"\x55\x55")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "files", property(lambda self: exec("raise KeyboardInterrupt")))
        patch.setattr(hashes.InputHashes, "check", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            merge(repos, tmp_path / "out")
    path.write_bytes(whole)
    assert merge(repos, tmp_path / "out") == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_others_are_on_their_way(
    repos: list[str], damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the cache is read from there, and checked no less."""
    expected = merge(repos, tmp_path / "expected")
    shutil.rmtree(blob(repos[2]).parent.parent)
    if not damaged:
        fetch = HubSource.fetch

        def watched(self: HubSource, file: str, *others: object, **named: object) -> Path:
            assert self.repo == repos[2] or file != FILE
            return fetch(self, file, *others, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(HubSource, "fetch", watched)
        assert merge(repos, tmp_path / "out") == expected
        return
    damage(blob(repos[1]), blob(repos[1]).stat().st_size - 1, b"\x55")
    with pytest.raises(IntegrityError, match="was damaged in the cache"):
        merge(repos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(repos, tmp_path / "out") == expected


def test_a_cut_blob_is_fetched_again(repos: list[str], tmp_path: Path) -> None:
    expected = merge(repos, tmp_path / "expected")
    path = blob(repos[2])
    path.write_bytes(path.read_bytes()[:-10])
    assert merge(repos, tmp_path / "out") == expected


def test_localizing_does_not_wait_for_hashes(repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second merge reads no blob for its hash."""
    monkeypatch.setattr(known_hashes, "SETTLED", 0)
    monkeypatch.setattr(hashes.InputHashes, "_run_ahead", lambda self: None)
    offer, hashed, seen = Scan._offer, [], []

    def watched(self: Scan, *args: object) -> None:
        seen.append(len(hashed))
        offer(self, *args)  # type: ignore[arg-type]

    reach = FollowingHash._reach

    def counted(self: FollowingHash, *args: object) -> None:
        if self.known is None:
            hashed.append(self)
        reach(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Scan, "_offer", watched)
    monkeypatch.setattr(FollowingHash, "_reach", counted)
    monkeypatch.setattr("hf_locstitch.checkpoints.hub.file_sha256", lambda path: pytest.fail(f"hashed {path} first"))
    merge(repos, tmp_path / "one")
    assert seen[0] == 0 and hashed
    hashed.clear()
    merge(repos, tmp_path / "two")
    assert not hashed


def test_verify_does_not_believe_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_state(0)
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", finetune(base, 1))]
    quick_merge(folders[0], folders[1:], out=tmp_path / "out")
    monkeypatch.setattr(following_hash, "recall", lambda state: "0" * 64)
    assert verify(tmp_path / "out", base=folders[0], finetuned=[folders[1]]).ok
    quick_merge(folders[0], folders[1:], out=tmp_path / "believed")
    assert not verify(tmp_path / "believed", base=folders[0], finetuned=[folders[1]]).ok
