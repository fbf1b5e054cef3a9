"""Links in a model's folder: only those that stay with the model are followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import merge_folders, quick_merge
from helpers.systems import needs_links

from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.errors import CheckpointError

pytestmark = needs_links


def _models(tmp: Path) -> Path:
    base = random_state(0)
    save(tmp / "ft", finetune(base, 1))
    return save(tmp / "base", base)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "README.md", "model.safetensors", "config.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, file: str, relative: bool) -> None:
    base = _models(tmp_path)
    secret = tmp_path / "home" / "token"
    secret.parent.mkdir()
    secret.write_bytes((base / file).read_bytes() if (base / file).exists() else b"hf_secret")
    (base / file).unlink(missing_ok=True)
    (base / file).symlink_to(os.path.relpath(secret, base) if relative else secret)
    with pytest.raises(CheckpointError) as raised:
        quick_merge(base, tmp_path / "ft", out=tmp_path / "out")
    assert f"{base / file} is a link to {secret}" in str(raised.value) and not list(tmp_path.glob("*out*"))


def test_a_chain_of_links_counts_by_its_end(tmp_path: Path) -> None:
    base = _models(tmp_path)
    (tmp_path / "token").write_text("hf_secret")
    (base / "inner").symlink_to(tmp_path / "token")
    (base / "vocab.txt").symlink_to("inner")
    with pytest.raises(CheckpointError, match="token, outside the folder"):
        FolderSource(base).fetch("vocab.txt")


def test_links_that_nothing_reads_do_not_matter(tmp_path: Path) -> None:
    base = _models(tmp_path)
    (tmp_path / "token").write_text("hf_secret")
    (base / "notes.data").symlink_to(tmp_path / "token")
    (base / "gone.txt").symlink_to(tmp_path / "nowhere")
    out = merge_folders(tmp_path, [{"ref": str(tmp_path / "ft")}])
    assert not (out / "notes.data").exists()


def test_links_inside_the_folder_and_linked_folders_are_followed(tmp_path: Path) -> None:
    base = _models(tmp_path)
    (base / "kept").mkdir()
    (base / "kept" / "words").write_text("a\nb\n")
    (base / "vocab.txt").symlink_to("kept/words")
    (tmp_path / "alias").symlink_to("base")
    assert FolderSource(tmp_path / "alias").fetch("vocab.txt").read_text() == "a\nb\n"
    quick_merge(tmp_path / "alias", tmp_path / "ft", out=tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\nb\n"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_the_hub_caches_blobs_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "abc").write_text("words")
    snapshot = repo / "snapshots" / "commit"
    (snapshot / "tok").mkdir(parents=True)
    (snapshot / "vocab.txt").symlink_to("../../blobs/abc")
    (snapshot / "tok" / "vocab.txt").symlink_to("../../../blobs/abc")
    source = FolderSource(snapshot)  # of any cache
    assert source.fetch("vocab.txt").read_text() == source.fetch("tok/vocab.txt").read_text() == "words"
    elsewhere = tmp_path / "linked"
    elsewhere.mkdir()
    (elsewhere / "vocab.txt").symlink_to(repo / "blobs" / "abc")
    with pytest.raises(CheckpointError, match="is a link"):
        FolderSource(elsewhere).fetch("vocab.txt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert FolderSource(elsewhere).fetch("vocab.txt").read_text() == "words"
    (tmp_path / "cache" / "token").write_text("hf_secret")
    (elsewhere / "tokenizer.json").symlink_to(tmp_path / "cache" / "token")
    with pytest.raises(CheckpointError, match="is a link"):
        FolderSource(elsewhere).fetch("tokenizer.json")
