"""From the Hub back to the Hub with the real client."""

from __future__ import annotations

import tempfile
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from helpers.models import finetune, load, random_state, same_bits, save
from helpers.runs import quick_merge
from huggingface_hub import ModelCard, constants

from hf_locstitch import Magnitude, load_mask, merge_from_hub
from hf_locstitch.checkpoints import hub_client
from hf_locstitch.errors import PublishError
from loopback_hub import Fault, LoopbackHub

CARD = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# parent\n"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)


@pytest.fixture
def run_id() -> str:
    return uuid4().hex[:12]


@pytest.fixture
def parents(home_hub: LoopbackHub, tmp_path: Path, run_id: str) -> list[str]:
    """A base and two finetunes on the Hub, and in folders."""
    base = random_state(0)
    refs = []
    for name, state in {"base": base, "maths": finetune(base, 1), "code": finetune(base, 2)}.items():
        folder = save(tmp_path / name, state)
        (folder / "README.md").write_text(CARD)
        (folder / "tokenizer.json").write_text("{}")
        home_hub.add_repo(f"demo/{run_id}-{name}", {file.name: file for file in folder.iterdir()})
        refs.append(f"demo/{run_id}-{name}")
    home_hub.requests.clear()
    return refs


def on_hub(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    return {path: hub.read(repo, path) for path in hub.files(repo) if path != ".gitattributes"}


def test_pushed_is_what_lies_in_out(home_hub: LoopbackHub, parents: list[str], tmp_path: Path, run_id: str) -> None:
    repo = f"demo/{run_id}-merged"
    out = tmp_path / "out"
    result = merge_from_hub(
        parents[0], parents[1:], out=out, push_to=repo, names=["maths", "code"], localizer=Magnitude(density=0.3)
    )
    local = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert on_hub(home_hub, repo) == local
    assert result.commit == home_hub.head(repo) and result.url == f"{home_hub.endpoint}/{repo}"
    assert len(home_hub.commits(repo)) == 2  # the repo's own first one, and ours
    assert home_hub.commits(repo)[0].parent == home_hub.commits(repo)[1].sha

    folders = quick_merge(
        tmp_path / "base", [tmp_path / "maths", tmp_path / "code"], out=tmp_path / "b", localizer=Magnitude(density=0.3)
    )
    assert same_bits(load(out), load(tmp_path / "b")) and folders.url is None
    mask, there = load_mask(out, "maths"), load_mask(repo, "maths")
    assert mask.keys() == there.keys() and all((mask[name] == there[name]).all() for name in mask)

    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "base_model": parents,
        "base_model_relation": "merge",
        "tags": ["merge", "hf-locstitch", "localize-and-stitch"],
    }
    assert "https://arxiv.org/abs/2408.13656" in card.text
    pinned = yaml.safe_load((out / "locstitch.yaml").read_text())
    assert pinned["base"]["ref"] == f"{parents[0]}@{home_hub.head(parents[0])}"
    for content in local.values():
        assert str(tmp_path).encode() not in content and b"hf_loopback" not in content


def test_push_alone_leaves_nothing_here(
    home_hub: LoopbackHub, parents: list[str], tmp_path: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    repo = f"lab/{run_id}-merged"
    result = quick_merge(parents[0], parents[1:], push_to=repo, private=True)
    assert result.out is None and "model.safetensors" in on_hub(home_hub, repo)
    assert not list(scratch.iterdir())
    assert home_hub._store.get("model", repo).private


def test_what_an_earlier_model_left_is_removed(
    home_hub: LoopbackHub, parents: list[str], tmp_path: Path, run_id: str
) -> None:
    repo = f"demo/{run_id}-merged"
    stale = {"pytorch_model.bin": b"x", "model-00001-of-00002.safetensors": b"y", "masks/old.safetensors": b"z"}
    stale[".eval_results/mmlu.yaml"] = b"- dataset: {id: cais/mmlu, task_id: mmlu}\n  value: 0.5\n"
    home_hub.add_repo(repo, {**stale, "notes.md": "kept"})
    quick_merge(parents[0], parents[1:], push_to=repo)
    assert not stale.keys() & home_hub.files(repo).keys() and "notes.md" in home_hub.files(repo)
    assert len(home_hub.commits(repo)) == 3


@pytest.mark.parametrize("kind", ["lost_answer", "status", "reset"])
def test_a_fault_at_the_commit_makes_one_commit(
    home_hub: LoopbackHub, parents: list[str], run_id: str, kind: str
) -> None:
    repo = f"demo/{run_id}-merged"
    home_hub.fail(Fault(kind, method="POST", path=f"{repo}/commit/"))  # type: ignore[arg-type]
    result = quick_merge(parents[0], parents[1:], push_to=repo)
    assert not home_hub.faults
    assert len(home_hub.commits(repo)) == 2 and result.commit == home_hub.head(repo)


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "objects/batch", "/api/whoami"])
def test_a_fault_on_the_way_is_tried_again(home_hub: LoopbackHub, parents: list[str], run_id: str, path: str) -> None:
    home_hub.fail(Fault("status", status=500, path=path))
    quick_merge(parents[0], parents[1:], push_to=f"demo/{run_id}-merged")
    assert not home_hub.faults and len(home_hub.commits(f"demo/{run_id}-merged")) == 2


def test_the_target_moved_meanwhile(
    home_hub: LoopbackHub, parents: list[str], tmp_path: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    repo = f"demo/{run_id}-merged"
    preupload = HfApi.preupload_lfs_files

    def slow(*args: object, **kwargs: object) -> None:
        preupload(*args, **kwargs)  # type: ignore[arg-type]
        if "moved.txt" not in home_hub.files(repo):
            home_hub.add_repo(repo, {"moved.txt": "by somebody else"})

    monkeypatch.setattr(HfApi, "preupload_lfs_files", slow)
    with pytest.raises(PublishError, match="moved from") as raised:
        quick_merge(parents[0], parents[1:], out=tmp_path / "out", push_to=repo)
    assert "model.safetensors" not in home_hub.files(repo) and home_hub.read(repo, "moved.txt")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert f"hf upload {repo}" in str(raised.value)


def test_what_is_there_already_is_not_committed_again(home_hub: LoopbackHub, parents: list[str], run_id: str) -> None:
    """As after a kill between the commit and the end."""
    repo = f"demo/{run_id}-merged"
    first = quick_merge(parents[0], parents[1:], push_to=repo)
    again = quick_merge(parents[0], parents[1:], push_to=repo)
    assert again.commit == first.commit == home_hub.head(repo) and len(home_hub.commits(repo)) == 2
    home_hub.add_repo(repo, {"model-00001-of-00002.safetensors": b"stale"})
    assert quick_merge(parents[0], parents[1:], push_to=repo).commit == home_hub.head(repo) != first.commit
    assert "model-00001-of-00002.safetensors" not in home_hub.files(repo)


def test_a_failed_push_keeps_the_merge(home_hub: LoopbackHub, parents: list[str], run_id: str) -> None:
    repo = f"demo/{run_id}-merged"
    home_hub.fail(Fault("status", method="POST", path=f"{repo}/commit/", status=403, times=9))
    with pytest.raises(PublishError, match="finished work is kept") as raised:
        quick_merge(parents[0], parents[1:], push_to=repo)
    home_hub._faults._waiting.clear()
    scratch = Path(constants.HF_HOME) / "hf-locstitch" / repo.replace("/", "--")
    assert list(scratch.glob(".merged.*.partial/out/model.safetensors")) and "hf_loopback" not in str(raised.value)
    assert len(home_hub.commits(repo)) == 1
    home_hub.requests.clear()
    quick_merge(parents[0], parents[1:], push_to=repo)
    assert not scratch.exists() and len(home_hub.commits(repo)) == 2
    assert not [request for request in home_hub.requests if request.method == "PUT"]
