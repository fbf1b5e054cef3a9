"""Fisher merging against a transcription in plain autograd, in memory on the loaded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from demo.skills import make_tokenizer
from helpers.data import WORDS, write_jsonl
from helpers.families import build, family
from helpers.models import State, load, same_bits
from helpers.refits import read_record
from helpers.runs import Killed
from safetensors.torch import save_file
from torch import Tensor

from hf_locstitch.cli.main import main
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.methods.fisher import drawn, own_answers, weighted_mean
from hf_locstitch.tasks.sets import LocalizationSet, open_set, read_rows
from hf_locstitch.tasks.task import Task

TEXTS = [WORDS, ["ab=ba", "012=210", "next 3=4", "c", "fed=def", "2 0=02"]]
CLASSES = 3


def prepare(kind: str, tmp: Path) -> list[Path]:
    """Folders of a family of which all tensors differ, and their labelled texts of unequal lengths."""
    folders = family(build(kind, torch.float32), tmp)
    for seed, folder in enumerate(folders[1:]):
        draws = torch.Generator().manual_seed(seed)
        state = {name: value + 0.1 * torch.randn(value.shape, generator=draws) for name, value in load(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        rows = [{"text": text, "label": number % CLASSES} for number, text in enumerate(TEXTS[seed])]
        if kind != "bert-classes":
            rows = [{"prompt": text[:2], "completion": text[2:] or "a"} for text in TEXTS[seed]]
        write_jsonl(tmp / f"{seed}.jsonl", rows)
    return folders


def command(tmp: Path, order: tuple[int, ...] = (0, 1), **fields: Any) -> list[str]:
    weights = fields.pop("weights", None)
    recipe = {"method": {"name": "fisher", **fields}, **({"weights": weights} if weights else {})}
    (tmp / "how.yaml").write_text(yaml.safe_dump(recipe))
    folders, data = [str(tmp / f"ft{one}") for one in order], [str(tmp / f"{one}.jsonl") for one in order]
    return ["merge", str(tmp / "how.yaml"), "--base", str(tmp / "base"), "--ft", *folders, "--data", *data, "--quiet",
            "--no-figures"]  # fmt: skip


def merge(tmp: Path, out: str, order: tuple[int, ...] = (0, 1), **fields: Any) -> State:
    assert main([*command(tmp, order, **fields), "--out", str(tmp / out)]) == 0
    return load(tmp / out)


def squares(model: Any, scores: list[tuple[float, Tensor]]) -> State:
    """Σ weight · (∂ score / ∂θ)², by parameter; 0 of what is not used."""
    own = dict(model.named_parameters())
    total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in own.items()}
    for weight, score in scores:
        found = torch.autograd.grad(score, list(own.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(own, found, strict=True):
            if gradient is not None:
                total[name] += weight * gradient.double().square()
    return total


def information(kind: str, folder: Path, file: Path, labels: str) -> State:
    """One text at a time, so that nothing is padded; in the order of the product, by which answers are drawn."""
    rows = read_rows(open_set(LocalizationSet(ref=str(file))))
    tokenizer, name = make_tokenizer(), "SequenceClassification" if kind == "bert-classes" else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{name}").from_pretrained(folder).eval()
    total: State = {}
    for number, row in enumerate(rows):
        if kind == "bert-classes":
            ids = tokenizer(row["text"], return_tensors="pt")
            log_p = model(**ids).logits.log_softmax(-1)[0]
            given = [(1.0, log_p[row["label"]])]
            of_model = [(log_p[k].exp().item(), log_p[k]) for k in range(CLASSES)]
        else:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            log_p = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            given = [(1.0, log_p.gather(1, ids[0, len(prompt) :, None]).sum())]
            of_model = [(1.0, log_p.gather(1, drawn(log_p.detach(), 0, number)[:, None]).sum())]
        for name, value in squares(model, given if labels == "data" else of_model).items():
            total[name] = total.get(name, torch.zeros(())) + value / len(rows)
    return total


def reference(kind: str, folders: list[Path], labels: str, unit_norm: bool, weights: list[float]) -> State:
    """Σ w F θ / Σ w F."""
    states = [load(folder) for folder in folders[1:]]
    found = [
        information(kind, folder, folder.parent / f"{number}.jsonl", labels)
        for number, folder in enumerate(folders[1:])
    ]
    for number, one in enumerate(found):
        every = torch.cat([one[name].flatten() for name in states[0]])
        norm, floor = every.norm().item() if unit_norm else 1.0, 1e-12 * every.square().mean().sqrt()
        found[number] = {name: weights[number] / norm * value * (value > floor) for name, value in one.items()}
    merged = {}
    for name in states[0]:
        total = sum(one[name] for one in found)
        plain = sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True)) / sum(weights)
        weighted = sum(one[name] * state[name] for one, state in zip(found, states, strict=True)) / torch.where(
            total == 0, 1.0, total
        )
        merged[name] = torch.where(total == 0, plain, weighted)
    return merged


@pytest.mark.parametrize(
    ("kind", "labels", "unit_norm", "weights"),
    [
        ("bert-classes", "model", True, [1.0, 1.0]),
        ("bert-classes", "data", False, [0.7, 1.5]),
        ("llama", "model", False, [1.0, 1.0]),
        ("gpt2", "data", True, [2.0, 0.5]),
    ],
)
def test_equals_the_transcription(
    kind: str, labels: str, unit_norm: bool, weights: list[float], tmp_path: Path
) -> None:
    folders = prepare(kind, tmp_path)
    merged = merge(tmp_path, "out", labels=labels, unit_norm=unit_norm, weights=weights)
    due = reference(kind, folders, labels, unit_norm, weights)
    states = [load(folder) for folder in folders[1:]]
    far = 0
    for name, values in merged.items():
        assert torch.allclose(values.double(), due[name], atol=1e-5), name
        mean = (weights[0] * states[0][name] + weights[1] * states[1][name]) / sum(weights)
        far += int((values - mean).abs().max() > 0.02)
    record = read_record(tmp_path / "out")["stitch"]
    assert far > 10 and len(record["refitted"]) == len(merged) and record["counts"]["ft0"]["fitted"] == len(TEXTS[0])


def test_a_mean_by_hand_and_where_it_is_open() -> None:
    """(1·2 + 3·6) / 4 = 5; where all is 0, and where weights of both signs cancel, the weighted mean."""
    finetuned = [torch.tensor(one).double().numpy() for one in ([2.0, 2.0, 2.0], [6.0, 6.0, 8.0])]
    weighted = [torch.tensor(one).double().numpy() for one in ([1.0, 0.0, 1.0], [3.0, 0.0, -1.0])]
    merged, uninformed = weighted_mean(finetuned, weighted, [1.0, 3.0])
    assert merged.tolist() == [5.0, 5.0, 6.5] and uninformed == 2


def test_answers_are_drawn_as_probable_as_they_are() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    counts = (
        torch.bincount(torch.cat([drawn(p.log().expand(50, 4), 1, number) for number in range(200)]), minlength=4)
        / 10_000
    )
    assert counts[1] == 0 and (counts - p).abs().max() < 0.02
    assert torch.equal(drawn(p.log()[None], 1, 7), drawn(p.log()[None], 1, 7))


def test_the_expectation_is_exact() -> None:
    """Of a softmax over its own scores, the information is diag p − p pᵀ."""
    scores = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    task = own_answers(Task([None], [1], lambda *_: scores.sum(), lambda *_: scores), 3, 0, "ft")
    found = torch.zeros(1, 3)
    for example in task.examples:
        (gradient,) = torch.autograd.grad(task.loss(None, [example]), scores)
        found += gradient.square()
    p = scores.detach().softmax(-1)
    assert torch.allclose(found, p - p.square(), atol=1e-6)


def test_neither_the_order_of_models_nor_where_the_numbers_are_matters(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    one = merge(tmp_path, "one")
    assert same_bits(one, merge(tmp_path, "flipped", order=(1, 0), state_on="disk"))


def test_a_killed_merge_takes_up_the_information_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("llama", tmp_path)
    whole = merge(tmp_path, "whole")
    finish = FittedWriter.finish

    def cut(self: FittedWriter, heading: str, **notes: Any) -> None:
        finish(self, heading, **notes)
        if self._folder.name == "information.1":
            raise Killed

    monkeypatch.setattr(FittedWriter, "finish", cut)
    with pytest.raises(Killed):
        main([*command(tmp_path), "--out", str(tmp_path / "out")])
    monkeypatch.undo()
    monkeypatch.setattr("hf_locstitch.stitch.refit.models.open_task", lambda *_: pytest.fail("a model is run again"))
    assert same_bits(whole, merge(tmp_path, "out"))


def test_the_plan_the_record_and_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("bert-classes", tmp_path)
    asked = command(tmp_path, inputs=4)
    assert main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Fisher merging on up to 4 inputs per finetune" in said and "24 passes" in said  # 2 · 4 inputs · 3 classes
    assert main([*asked, "--dry-run", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["refitting"]
    merged = sum(value.numel() for value in load(tmp_path / "base").values())
    assert cost["weights"] == cost["information"] == 4 * merged and cost["disk"] == 3 * 4 * merged
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    record, card = read_record(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert record["method"] == "fisher" and record["stitch"]["labels"] == "model" and record["masks"] == {}
    assert record["stitch"]["counts"]["ft1"]["fitted"] == 4 and record["stitch"]["uninformed"] > 0  # unseen tokens
    assert "2111.09832" in card and "## Fisher information" in card and "are the plain mean" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("fields", "flags", "said"),
    [
        ({}, ["--data", "0.jsonl"], "needs one --data entry of unlabelled inputs per finetune: expected 2, got 1"),
        ({"labels": "data"}, [], "labels: data needs labels, but 6 of the 6 inputs of ft1"),
        ({"data": {"objective": {"kind": "features"}}}, [], "needs the probabilities of answers, but for ft0 only"),
        ({}, ["--max-memory", "250MB"], "use --method average"),
        ({"lables": "data"}, [], "did you mean 'labels'"),
    ],
)
def test_refused_before_anything_is_written(
    fields: dict[str, Any], flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("bert-classes", tmp_path)
    write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in TEXTS[1]])
    asked = command(tmp_path, **{key: value for key, value in fields.items() if key != "data"})
    if "data" in fields or "--data" in flags:  # in place of the command's, to which another --data would be added
        at = asked.index("--data")
        del asked[at : at + 3]
    if "data" in fields:
        recipe = yaml.safe_load((tmp_path / "how.yaml").read_text())
        recipe["data"] = [{"ref": str(tmp_path / f"{seed}.jsonl"), **fields["data"]} for seed in range(2)]
        (tmp_path / "how.yaml").write_text(yaml.safe_dump(recipe))
    assert main([*asked, *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
