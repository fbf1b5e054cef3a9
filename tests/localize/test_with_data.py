"""Localizing with data through the whole job: from a recipe to the merge, its masks, its record and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from demo.skills import make_tokenizer
from helpers.architectures import blocks
from helpers.data import ROWS, WORDS, write_jsonl
from helpers.families import finetunes
from helpers.grafted import CASES, prepare
from helpers.models import load
from helpers.runs import quick_merge
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file

from hf_locstitch import LocstitchError, Magnitude, Mask, RequestError, Saliency, load_mask
from hf_locstitch.cli.main import main
from hf_locstitch.errors import RecipeError
from hf_locstitch.localize import search_with_data as module
from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.shares import exact_share
from hf_locstitch.tasks.sets import LocalizationSet, open_set, read_rows
from loopback_hub import LoopbackHub


def top(scores: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """The k largest of all; the scores have no ties at the threshold."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.sort(descending=True).values[k - 1]
    return {name: score >= threshold for name, score in scores.items()}


@pytest.mark.parametrize("how", [Saliency(density=0.1), Mask(density=0.1, epochs=2, micro_batch=2)])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_masks_are_the_top_k_of_the_scores(how: Any, kind: str, tmp_path: Path) -> None:
    """In float64 and through the command's own path, against scores reverted by hand."""
    base, first, second = finetunes(tmp_path, kind, torch.float32)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    quick_merge(base, [first, second], out=tmp_path / "out", localizer=how, data=[str(data), str(data)])
    state = load(base)
    k = exact_share(0.1, sum(state[name].numel() for name in blocks(state)))
    for folder in (first, second):
        grafted, _ = prepare("causal-lm" if kind == "llama" else kind, (base, folder))
        objective = CASES["causal-lm"][1]
        rows = read_rows(open_set(LocalizationSet(ref=str(data))))
        task = objective.prepare(rows, make_tokenizer(), None)
        room = Room(tmp_path, Processes())
        scores = (
            saliency_scores(how, grafted, task, room)
            if isinstance(how, Saliency)
            else learn_mask(how, grafted, task, room)[0]
        )
        due = top(dict(grafted.to_disk(scores.__getitem__)), k)
        found = load_mask(tmp_path / "out", folder.name)
        assert sum(int(mask.sum()) for mask in found.values()) == k
        assert found.keys() == due.keys() == set(blocks(state))
        assert all(torch.equal(found[name], due[name]) for name in due)
    merged, tuned = load(tmp_path / "out"), [load(first), load(second)]
    masks = [load_mask(tmp_path / "out", name) for name in ("ft", "ft1")]
    for name in blocks(state):
        only = masks[0][name] & ~masks[1][name]
        assert torch.equal(merged[name][only], tuned[0][name][only])
        neither = ~masks[0][name] & ~masks[1][name]
        assert torch.equal(merged[name][neither], state[name][neither])


def test_ties_go_to_the_larger_task_vector_then_evenly(tmp_path: Path) -> None:
    """An expert that no token visits leaves S as it began; nothing but |τ| tells such elements apart."""
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    how = Mask(density=0.2, start_density=0.05, epochs=0)
    quick_merge(base, [first], out=tmp_path / "out", localizer=how, data=[str(data)])
    quick_merge(base, [first], out=tmp_path / "plain", localizer=Magnitude(density=0.2))
    learned, plain = load_mask(tmp_path / "out", "ft"), load_mask(tmp_path / "plain", "ft")
    assert all(torch.equal(learned[name], plain[name]) for name in plain)


def test_rounded_masks(tmp_path: Path) -> None:
    """`density: null`: a mask keeps what σ(S) rounds to 1; the record has no k, and verify finds nothing wrong."""
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    how = Mask(density=None, start_density=0.1, start=(-0.5, 0.5), epochs=2, lr=3.0)
    quick_merge(base, [first], out=tmp_path / "out", localizer=how, data=[str(data)])
    grafted, task = prepare("causal-lm", (base, first))
    rows = read_rows(open_set(LocalizationSet(ref=str(data))))
    task = CASES["causal-lm"][1].prepare(rows, make_tokenizer(), None)
    scores, _ = learn_mask(how, grafted, task, Room(tmp_path, Processes()))
    due = {name: torch.sigmoid(score).round().bool() for name, score in grafted.to_disk(scores.__getitem__)}
    found = load_mask(tmp_path / "out", "ft")
    assert all(torch.equal(found[name], due[name]) for name in due)
    record = json.loads((tmp_path / "out" / "locstitch.json").read_text())
    ones = sum(int(mask.sum()) for mask in due.values())
    started = exact_share(0.1, record["N"])
    assert record["k"] is None and record["masks"]["ft"]["ones"] == ones != started
    assert record["masks"]["ft"]["density"] is None
    assert main(["verify", str(tmp_path / "out"), "--base", str(base), "--ft", str(first), "--quiet"]) == 0


def test_a_saturated_mask_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    how = Mask(density=None, start=(0.5, 0.5), epochs=1, lr=0.0)
    quick_merge(base, [first], out=tmp_path / "out", localizer=how, data=[str(data)])
    (warning,) = json.loads((tmp_path / "out" / "locstitch.json").read_text())["warnings"]
    assert "the mask of ft keeps" in warning and "(100 %)" in warning and "saturated" in warning
    assert warning in caplog.text and "saturated" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_and_what_it_records(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    finetunes(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in WORDS])
    monkeypatch.chdir(tmp_path)
    common = ["merge", "--base", "./base", "--ft", "./ft", "./ft1", "--localizer", "saliency", "--density", "0.05",
              "--no-figures"]  # fmt: skip
    assert main([*common, "--data", "a.jsonl", "b.jsonl", "--out", "out", "--quiet"]) == 0
    record = json.loads(Path("out/locstitch.json").read_text())
    assert record["localizer"]["method"] == "saliency" and record["k"] == record["masks"]["ft"]["ones"]
    assert record["data"]["ft"]["ref"] == "./a.jsonl" and len(record["data"]["ft1"]["sha256"]) == 64
    card = Path("out/README.md").read_text()
    assert "saliency" in card and "a.jsonl" in card and str(tmp_path) not in card
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    again = json.loads(Path("again/locstitch.json").read_text())
    assert again["outputs"]["model.safetensors"] == record["outputs"]["model.safetensors"]
    assert main(["verify", "out", "--base", "./base", "--ft", "./ft", "./ft1", "--quiet"]) == 0

    write_jsonl(tmp_path / "a.jsonl", ROWS[:3])  # other examples under the same name
    assert main(["merge", "out/locstitch.yaml", "--out", "third", "--quiet"]) == 2
    assert "a.jsonl has sha256" in capsys.readouterr().err and not Path("third").exists()


def test_a_dry_run_shows_the_data(tmp_path: Path, capsys: Any) -> None:
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    arguments = ["merge", "--base", base, "--ft", first, "--localizer", "mask", "--data", data, "--dry-run"]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "a.jsonl" in said and "mask, density 0.01" in said and "up to 64 drawn examples" in said
    assert "localizing" in said and "2 numbers per parameter, micro-batches of 8, 5 passes" in said
    assert main([*map(str, arguments), "--localizer", "saliency"]) == 0
    assert "1 number per parameter, micro-batches of 8, 1 pass of" in capsys.readouterr().out


def test_a_data_set_from_the_hub(tmp_path: Path, home_hub: LoopbackHub) -> None:
    """Pinned, its columns mapped; it is named in the card's metadata."""
    rows = [{"input": "abc", "output": "cba"} for _ in range(3)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    api = HfApi()
    repo = f"demo/{uuid4().hex[:12]}"
    api.create_repo(repo, repo_type="dataset")
    sha = api.upload_file(
        path_or_fileobj=tmp_path / "train.jsonl", path_in_repo="train.jsonl", repo_id=repo, repo_type="dataset"
    ).oid
    base, first = finetunes(tmp_path, count=1)
    columns = {"prompt": "input", "completion": "output"}
    asked = {"ref": repo, "columns": columns, "number": 2, "role": "held-out"}
    quick_merge(base, [first], out=tmp_path / "out", localizer=Saliency(density=0.1), data={"ft": asked})
    recipe = yaml.safe_load((tmp_path / "out" / "locstitch.yaml").read_text())
    assert recipe["data"]["ft"]["ref"] == f"{repo}@{sha}" and recipe["data"]["ft"]["role"] == "held-out"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == [repo]
    assert "held-out" in card.text


def test_a_killed_run_does_not_score_again(tmp_path: Path, monkeypatch: Any) -> None:
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    ask: Any = {"out": tmp_path / "out", "localizer": Saliency(density=0.1), "data": [str(data)]}
    scan = module.Scan

    def killed(*args: Any, **options: Any) -> Any:
        raise OSError("killed")

    monkeypatch.setattr(module, "Scan", killed)
    with pytest.raises(OSError, match="killed"):
        quick_merge(base, [first], **ask)
    monkeypatch.setattr(module, "Scan", scan)
    monkeypatch.setattr("hf_locstitch.localize.score.open_grafted_model", killed)
    quick_merge(base, [first], **ask)
    found = load_mask(tmp_path / "out", "ft")
    monkeypatch.undo()
    quick_merge(base, [first], **{**ask, "out": tmp_path / "afresh"})
    assert all(torch.equal(mask, found[name]) for name, mask in load_mask(tmp_path / "afresh", "ft").items())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"localizer": Saliency()}, "saliency needs one --data entry per finetune: expected 1, got 0"),
    (
        {"localizer": Magnitude(), "data": ["a.jsonl"]},
        "only these use any: the localizers mask and saliency, stitch: refit, and the methods fisher, regmean",
    ),
    ({"localizer": Saliency(), "data": ["b.jsonl"]}, "b.jsonl' is neither a local file"),
    ({"localizer": Saliency(), "data": ["./b.jsonl"]}, "b.jsonl does not exist"),
    ({"localizer": Saliency(), "data": {"other": "a.jsonl"}}, "'other', which is not one of the finetunes"),
    ({"localizer": {"method": "mask", "device_map": "auto"}, "data": ["a.jsonl"]}, "device_map is not supported"),
    ({"localizer": {"method": "mask", "epoch": 3}, "data": ["a.jsonl"]}, "did you mean 'epochs'"),
    (
        {"localizer": {"method": "mask", "micro_batch": "all"}, "data": ["a.jsonl"]},
        "localizer.micro_batch: it must be \"auto\" or a whole number of examples, 1 or more \\(got 'all'\\)",
    ),
    ({"localizer": {"method": "saliency", "micro_batch": 0}, "data": ["a.jsonl"]}, "1 or more \\(got 0\\)"),
    ({"localizer": Saliency(), "data": [{"ref": "a.jsonl", "columns": {"text": "txt"}}]}, "no column 'txt'"),
    ({"localizer": Saliency(), "data": ["c.jsonl"]}, "needed is one of"),
    ({"localizer": Saliency(), "data": ["a.jsonl"], "allow_non_finite": True}, "allow_non_finite"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_refused_before_anything_is_written(fields: Any, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    base, first = finetunes(tmp_path, count=1)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "c.jsonl", [{"question": "why"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=said) as error:
        quick_merge(base, [first], out="out", **fields)
    assert isinstance(error.value, LocstitchError)
    assert not Path("out").exists() and not list(tmp_path.glob(".out*"))


def test_a_tensor_that_is_no_parameter_is_refused(tmp_path: Path) -> None:
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for folder in (base, first):
        state = {**load(folder), "model.layers.9.extra.weight": torch.ones(4)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model.layers.9.extra.weight is to be localized but is not a parameter"):
        quick_merge(base, [first], out=tmp_path / "out", localizer=Saliency(), data=[str(data)])
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_needs_an_objective(tmp_path: Path) -> None:
    base, first = finetunes(tmp_path, "bert", count=1)
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(WORDS)])
    with pytest.raises(RecipeError, match=r"for which no objective is known\. Set the objective of its data"):
        quick_merge(base, [first], out=tmp_path / "out", localizer=Saliency(), data=[str(data)])
    objective = {"kind": "text-zero-shot", "classes": ["abc", "0123"]}
    asked = [{"ref": str(data), "objective": objective}]
    quick_merge(base, [first], out=tmp_path / "out", localizer=Saliency(), data=asked)
    recipe = yaml.safe_load((tmp_path / "out" / "locstitch.yaml").read_text())
    assert recipe["data"]["ft"]["objective"]["kind"] == "text-zero-shot"
