"""Work offline (HF_HUB_OFFLINE), from what earlier work left in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save_sharded
from helpers.runs import files_of, quick_merge
from huggingface_hub import constants, hf_hub_download

from hf_locstitch import Magnitude, plan_merge
from hf_locstitch.checkpoints import hub_client
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, DownloadError, IntegrityError
from loopback_hub import Fault, LoopbackHub


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)


@pytest.fixture
def repos(home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path) -> list[str]:
    """A base and two finetunes; the embeddings and the head, which no mask covers, are in shards of their own."""
    base = random_state(0)
    refs = []
    for name, state in {"base": base, "maths": finetune(base, 1), "code": finetune(base, 2)}.items():
        folder = save_sharded(tmp_path / name, state, lambda names: [names[:1], names[1:-1], names[-1:]])
        refs.append(f"demo/{uuid4().hex[:8]}-{name}")
        home_hub.add_repo(refs[-1], {file.name: file for file in folder.iterdir()})
    return refs


def merge(repos: list[str], out: Path, **fields: object) -> dict[str, str]:
    names = ["maths", "code"]
    quick_merge(repos[0], repos[1:], out=out, names=names, localizer=Magnitude(density=0.3), **fields)  # type: ignore[arg-type]
    return files_of(out)


def inputs(out: Path) -> object:
    manifest = json.loads((out / "locstitch.json").read_text())
    return manifest["inputs"], manifest["fingerprint"]


def test_the_same_merge_again(repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were not needed were not fetched, and are not needed offline; their hashes are known all the same."""
    online = merge(repos, tmp_path / "online")
    assert HubSource(repos[1], None).cached("model-00001-of-00003.safetensors") is None
    go_offline(monkeypatch)
    assert merge(repos, tmp_path / "offline") == online
    assert inputs(tmp_path / "offline") == inputs(tmp_path / "online")
    assert not main(["merge", str(tmp_path / "online" / "locstitch.yaml"), "--out", str(tmp_path / "again"), "--quiet"])
    assert files_of(tmp_path / "again") == online
    assert not main(["verify", str(tmp_path / "online"), "--quiet"])


def test_after_a_merge_that_kept_nothing(repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(repos, tmp_path / "online", cache=False)
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=r"model-00001-of.*not in the cache.*HF_HUB_OFFLINE.*hf download"):
        merge(repos, tmp_path / "offline")
    assert not list(tmp_path.glob("*offline*"))
    command = ["merge", "--base", repos[0], "--ft", *repos[1:], "--dry-run"]
    assert main(command) == 2
    plan = plan_merge({"base": repos[0], "finetuned": repos[1:]})  # the plan itself needs no weights
    assert plan.base.source.pinned.startswith(repos[0])


def test_what_other_programs_fetched(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in home_hub.files(repos[0]):
        hf_hub_download(repos[0], file)
    go_offline(monkeypatch)
    source = open_checkpoint(parse_ref(repos[0])).source
    file = "model-00002-of-00003.safetensors"
    assert source.fetch(file).read_bytes() == home_hub.read(repos[0], file)
    if not source.fetch(file).is_symlink():
        return  # where it cannot link, the client gives a file no name that tells its hash
    path = source.fetch("model-00001-of-00003.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match="damaged in the cache"):
        open_checkpoint(parse_ref(repos[0])).source.fetch("model-00001-of-00003.safetensors")


def test_the_hub_is_away(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    merge(repos, tmp_path / "online")
    home_hub.fail(Fault("reset", path=f"/api/models/{repos[0]}", times=99))
    try:
        with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE=1.*cache"):
            merge(repos, tmp_path / "away")
    finally:
        home_hub._faults._waiting.clear()


def test_damaged_notes_are_ignored(repos: list[str], hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in HubSource(repos[0], None).files:
        HubSource(repos[0], None).fetch(file)
    for note in hub_cache.glob("models--*/locstitch/*"):
        note.write_bytes(note.read_bytes()[:-3])
    go_offline(monkeypatch)
    assert len(open_checkpoint(parse_ref(repos[0])).shards) == 3


def test_files_beside_the_weights_are_needed_too(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that is listed but not in the cache is missed before the work, not left out."""
    home_hub.add_repo(repos[0], {"tokenizer.json": "{}"})
    for repo in repos:
        source = HubSource(repo, None)
        for file in source.files:
            if file != "tokenizer.json":
                source.fetch(file)
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of .* is not in the cache"):
        merge(repos, tmp_path / "offline")
    assert not list(tmp_path.glob("*offline*"))
