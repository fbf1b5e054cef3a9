"""Localization sets: where they come from, which examples are drawn, and what is said when they do not serve."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.data import push_rows, write_rows

from hf_locstitch.errors import CheckpointError, RecipeError, RequestError
from hf_locstitch.tasks.sets import LocalizationSet, choose, open_set, read_rows
from hf_locstitch.tasks.surrogates import SURROGATES
from loopback_hub import LoopbackHub

TWENTY = [{"text": f"text {i}", "label": i % 3} for i in range(20)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", TWENTY)
    rows = read_rows(open_set(LocalizationSet(ref=str(path), number=3, seed=1)))
    assert rows == [TWENTY[i] for i in choose([row["label"] for row in TWENTY], 20, 3, 1)]
    assert [sum(row["label"] == label for row in rows) for label in range(3)] == [3, 3, 3]


def test_choice_depends_on_the_seed_alone() -> None:
    assert choose(None, 100, 5, 0) == choose(None, 100, 5, 0) != choose(None, 100, 5, 1)
    assert choose(None, 100, 5, 0) == choose(None, 100, 50, 0)[:5]
    assert sorted(choose(None, 4, 9, 0)) == [0, 1, 2, 3]
    labels = ["a", "b", "a", "b", "a"]
    assert sorted(labels[i] for i in choose(labels, 5, 2, 0)) == ["a", "a", "b", "b"]


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "1+1=", "a": "2"}])
    asked = LocalizationSet(ref=str(path), columns={"prompt": "q", "completion": "a"})
    assert read_rows(open_set(asked))[0]["completion"] == "2"
    with pytest.raises(RequestError, match=r"needed is one of: messages; prompt and completion"):
        read_rows(open_set(LocalizationSet(ref=str(path))))


def test_a_file_is_held_to_its_hash(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TWENTY)
    found = open_set(LocalizationSet(ref=str(path)))
    assert found.pinned.ref == "./rows.jsonl" and found.pinned.sha256 == found.sha256
    with pytest.raises(CheckpointError, match="it holds different examples"):
        open_set(LocalizationSet(ref=str(path), sha256="0" * 64))


def test_slices_of_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(10)])
    for split, texts in (
        ("test[:50%]", "01234"),
        ("train[-2:]", "89"),
        ("train[:1]+train[9:]", "09"),
        ("all", "0123456789"),
    ):
        rows = read_rows(open_set(LocalizationSet(ref=str(path), split=split)))
        assert sorted(row["text"] for row in rows) == list(texts)
    for split in ("my-split", "train+test"):
        with pytest.raises(RecipeError, match="has one split, whatever it is called, but split is"):
            open_set(LocalizationSet(ref=str(path), split=split))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_an_empty_file_is_refused_as_such(suffix: str, tmp_path: Path) -> None:
    (path := tmp_path / f"rows{suffix}").touch()
    with pytest.raises(RecipeError, match="is empty"):
        open_set(LocalizationSet(ref=str(path)))


@pytest.mark.parametrize("ref", ["alpacca", "rows.jsonl", "./rows.jsonl", "./rows.txt"])
def test_what_is_nowhere(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("")
    hint = " Did you mean alpaca?" if ref == "alpacca" else ""
    with pytest.raises(RecipeError, match=rf"\.{re.escape(hint)} Check the path"):
        open_set(LocalizationSet(ref=ref))


def test_an_absent_data_set(home_hub: LoopbackHub) -> None:
    with pytest.raises(CheckpointError, match="demo/absent"):
        open_set(LocalizationSet(ref="demo/absent"))


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "unused"}
GSM8K = {"question": "1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}
HOTPOTQA = {
    "id": "x",
    "question": "Where?",
    "answer": "Here",
    "type": "bridge",
    "level": "easy",
    "supporting_facts": {"title": ["A"], "sent_id": [0]},
    "context": {"title": ["A", "B"], "sentences": [["One. ", "Two."], ["Three."]]},
}
EXPECTED = {
    "alpaca": (ALPACA, "Add.\n\n1 and 2", "3", {"instruction": "Add.", "input": "1 and 2"}),
    "gsm8k": (GSM8K, "1+2?", "1+2=<<1+2=3>>3\n#### 3", {"instruction": "1+2?", "input": ""}),
    "hotpotqa": (HOTPOTQA, "One. Two.\n\nWhere?", "Here", {"instruction": "One. Two.\n\nWhere?", "input": ""}),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_by_their_own_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the true schema, under the true config, through the real client."""
    known = SURROGATES[name]
    org, _, repo = known.repo.partition("/")
    row, prompt, completion, parts = EXPECTED[name]
    with LoopbackHub(tmp_path / "hub", orgs={"demo": [org]}) as hub:
        script = f"""
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from helpers.data import push_rows
from huggingface_hub import HfApi
from hf_locstitch.tasks.sets import LocalizationSet, open_set, read_rows
row = json.loads(sys.argv[2])
sha = push_rows("{org}/{repo}", [row, {{**row, "question" if "question" in row else "instruction": "other"}}],
           Path({str(tmp_path)!r}), {known.config!r}, HfApi())
found = open_set(LocalizationSet(ref={name!r}, number=2))
rows = read_rows(found)
print(json.dumps([sha, found.commit, found.pinned.ref, found.asked.role, found.describe(), rows]))
"""
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(sys.path), json.dumps(row)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    sha, commit, pinned, role, described, rows = json.loads(done.stdout.splitlines()[-1])
    assert commit == sha and pinned == f"{name}@{sha}" and role == "surrogate"
    assert {"prompt": prompt, "completion": completion, **parts} in rows and len(rows) == 2
    assert known.repo in described and "surrogate data" in described


@pytest.mark.parametrize(
    ("name", "rendering", "prompt", "completion"),
    [
        ("gsm8k", "reasoned", "1+2?", "1+2=3\nThe answer is 3."),
        ("gsm8k", "result", "1+2?", "3"),
        ("hotpotqa", "paragraphs", "One. Two.\n\nThree.\n\nWhere?", "Here"),
        ("hotpotqa", "closed-book", "Where?", "Here"),
    ],
)
def test_renderings_of_surrogates(name: str, rendering: str, prompt: str, completion: str) -> None:
    row = SURROGATES[name].row(EXPECTED[name][0], LocalizationSet(ref=name, rendering=rendering).rendering)
    assert (row["prompt"], row["completion"]) == (prompt, completion)


def test_renderings_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="gsm8k has no 'closed-book'; choose from: worked, reasoned, result"):
        LocalizationSet(ref="gsm8k", rendering="closed-book")
    with pytest.raises(ValueError, match="choose from: none"):
        LocalizationSet(ref="org/data", rendering="worked")


def test_unique_repos_are_pinned(tmp_path: Path, home_hub: LoopbackHub) -> None:
    """What was pinned is read again although the data set has moved on."""
    from huggingface_hub import HfApi

    repo = f"demo/{uuid4().hex[:12]}"
    push_rows(repo, [{"text": "old"}], tmp_path, None, HfApi())
    found = open_set(LocalizationSet(ref=repo))
    push_rows(repo, [{"text": "new"}], tmp_path, None, HfApi())
    assert read_rows(open_set(found.pinned)) == [{"text": "old"}]
    assert read_rows(open_set(LocalizationSet(ref=repo))) == [{"text": "new"}]


def test_rows_are_chosen_by_their_values(tmp_path: Path) -> None:
    """As SNLI's −1 is left out; names are ours or the data's; each class is drawn from what is left."""
    rows = [{"premise": str(i), "label": i % 4 - 1, "genre": "ab"[i % 2]} for i in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    asked = LocalizationSet(ref=str(path), number=2, columns={"text": "premise"}, where={"label": [0, 1, 2]})
    found = read_rows(open_set(asked))
    assert len(found) == 6 and {row["label"] for row in found} == {0, 1, 2}
    both = asked.model_copy(update={"where": {"text": ("3", "4", "5"), "genre": ("a",)}})
    assert [row["text"] for row in read_rows(open_set(both))] == ["4"]
    assert LocalizationSet(ref="x", where={"label": 1}).where == {"label": (1,)}  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"no row of .* is left"):
        read_rows(open_set(asked.model_copy(update={"where": {"label": ("0",)}})))
    with pytest.raises(RequestError, match=r"no column 'lable'.* `where`"):
        read_rows(open_set(asked.model_copy(update={"where": {"lable": (0,)}})))


def test_labels_are_mapped(tmp_path: Path) -> None:
    """Two of the data's labels may be one class, of which then as many are drawn as of any."""
    rows = [{"text": str(i), "label": i % 3} for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    labels = {0: "no", 1: "no", 2: "yes"}
    asked = LocalizationSet(ref=str(path), number=3, labels=labels)  # type: ignore[arg-type]
    found = read_rows(open_set(asked))
    assert sorted(row["label"] for row in found) == ["no", "no", "no", "yes", "yes", "yes"]
    assert all((row["label"] == "yes") == (int(row["text"]) % 3 == 2) for row in found)
    again = LocalizationSet.model_validate(json.loads(json.dumps(asked.dump())))
    assert again == asked
    with pytest.raises(RequestError, match=r"the label 2, which .* do not map .0, 1."):
        read_rows(open_set(asked.model_copy(update={"labels": {"0": 0, "1": 1}})))


@pytest.mark.parametrize("given", ["gsm8k", {"ref": "gsm8k", "number": 3}])
def test_surrogates_are_recorded_as_such(given: object) -> None:
    assert LocalizationSet.model_validate(given).role == "surrogate"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_of_a_file_are_checked_before_the_work(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"rows.{ending}", [{"question": "2 + 2?", "reply": "4"}])
    with pytest.raises(RequestError, match=r"has the columns question, reply, .* columns: \{prompt: question, comp"):
        open_set(LocalizationSet(ref=str(path)))
    with pytest.raises(RequestError, match=r"no column 'questoin'.*Did you mean question\?"):
        open_set(LocalizationSet(ref=str(path), columns={"text": "questoin"}))
    assert open_set(LocalizationSet(ref=str(path), columns={"text": "question"})).file == path


def test_a_column_may_begin_late_in_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"note": "x"}, {"text": "a"}])
    assert open_set(LocalizationSet(ref=str(path))).file == path
    path.write_text("not JSON")
    assert open_set(LocalizationSet(ref=str(path))).file == path  # who reads it says what is wrong
