"""What a refit must hold to: the limits in which its result is known, and what must not change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from demo.skills import make_tokenizer
from helpers.data import write_jsonl, write_texts
from helpers.families import build, family
from helpers.models import load, same_bits
from helpers.refits import HOW, SMALL, distance, read_record
from helpers.runs import Killed, quick_merge
from safetensors.torch import save_file

from hf_locstitch import Magnitude, Refit, RequestError
from hf_locstitch.cli.main import main
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.refit.fit import Fit
from hf_locstitch.tasks.sets import LocalizationSet, OpenSet, open_set

ONE: dict[str, Any] = {**SMALL, "held_out": 0, "lambdas": [0.1]}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A tiny Llama and two finetunes of it."""
    return family(build("llama", torch.float32), tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]


def merge(folders: list[Path], data: list[str], out: Path, **stitch: Any) -> None:
    quick_merge(folders[0], folders[1:], out=out, localizer=HOW, data=data, stitch={**ONE, **stitch})


def test_an_infinite_lambda_is_the_plain_stitch(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    merge(folders, data, tmp_path / "out", lambdas=["inf"])
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "mean"))
    assert read_record(tmp_path / "out")["stitch"]["refitted"] == []


def test_everything_free_recovers_a_finetune(folders: list[Path], tmp_path: Path) -> None:
    """Full masks, no lambda_, more tokens than inputs: linears that begin at the base end at the finetune's."""
    state, tuned = load(folders[0]), load(folders[1])
    linears = {
        name: tuned[name] if tensor.dim() == 2 and ".layers." in name else tensor for name, tensor in state.items()
    }
    save_file(linears, folders[1] / "model.safetensors", metadata={"format": "pt"})
    quick_merge(
        folders[0],
        folders[1:2],
        out=tmp_path / "out",
        localizer=Magnitude(density=1),
        scale=0,
        data=[str(write_texts(tmp_path / "many.jsonl", 200, seed=5))],
        stitch={**ONE, "inputs": 200, "batch": 50, "lambdas": [0], "ridge": 1e-7, "steps": 100},
    )
    lines = write_texts(tmp_path / "fresh.jsonl", 5, seed=6).read_text().splitlines()
    fresh = [make_tokenizer()(json.loads(line)["text"], return_tensors="pt")["input_ids"] for line in lines]
    logits = {}
    for name in ("out", "base", "ft0"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            logits[name] = torch.cat([model(ids).logits[0] for ids in fresh])
    far = (logits["base"] - logits["ft0"]).abs().max()
    assert (logits["out"] - logits["ft0"]).abs().max() < 0.02 * far


def test_a_linear_makes_up_for_what_came_before(folders: list[Path], tmp_path: Path) -> None:
    """The last of two layers keeps the base's values but for one matrix, with more inputs than there are tokens.

    The base's differs from the finetune's by a trifle there: all of it changed, so that all of it is in the mask."""
    alone = "model.layers.1.mlp.down_proj.weight"
    tuned = load(folders[1])
    put(folders[0], alone, lambda tensor: tensor.copy_(1.001 * tuned[alone]))
    text = write_jsonl(tmp_path / "one.jsonl", [{"text": "abc"}])
    quick_merge(
        folders[0],
        folders[1:2],
        out=tmp_path / "out",
        localizer=Magnitude(density=1),
        include=[alone],
        data=[str(text)],
        stitch={**ONE, "inputs": 1, "lambdas": [0], "ridge": 1e-7, "steps": 100},
    )
    ids = make_tokenizer()("abc", return_tensors="pt")["input_ids"]
    hidden = {}
    for name in ("out", "base", "ft0"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        layer: Any = model.model.layers[-1]
        layer.register_forward_hook(lambda _, __, output, name=name: hidden.__setitem__(name, output))
        with torch.no_grad():
            model(ids)
    far = (hidden["base"] - hidden["ft0"]).abs().max()
    assert (hidden["out"] - hidden["ft0"]).abs().max() < 0.05 * far


def test_batches_and_order_do_not_matter(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    merge(folders, data, tmp_path / "one")
    merge(folders, data, tmp_path / "batch", batch=24)
    for path in data:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        write_jsonl(Path(path), rows[::-1])
    merge(folders, data, tmp_path / "order")
    merge(folders, data, tmp_path / "again")
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    far = distance(tmp_path / "one", tmp_path / "mean")
    assert distance(tmp_path / "one", tmp_path / "batch") < 0.01 * far
    assert distance(tmp_path / "one", tmp_path / "order") < 0.01 * far
    assert same_bits(load(tmp_path / "order"), load(tmp_path / "again"))


def test_the_best_lambda_is_shipped(
    folders: list[Path], data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the first pass and the fits say; losers leave nothing behind."""
    scores = {0.0: 3.0, 1.0: 1.0, 3.0: 2.0}
    run, writers = Fit.run, []

    def told(self: Fit) -> list[float]:
        run(self)
        writers.append([path.name for path in (self._writer._folder.parent).iterdir()] if self._writer else [])
        of_base = self.models[0].merged is self.models[0].original
        return [1.0 if of_base else scores.get(self.lambda_, 9.0)] * 2

    monkeypatch.setattr(Fit, "run", told)
    merge(folders, data, tmp_path / "out", held_out=0.25, lambdas=[0.0, 1.0, 3.0, "inf"])
    record = read_record(tmp_path / "out")["stitch"]
    assert record["lambda"] == "1" and record["disagreement"] == {"0": 3.0, "1": 1.0, "3": 2.0, "inf": 9.0}
    assert "0" not in writers[-1]
    merge(folders, data, tmp_path / "one", held_out=0.25, lambdas=[1.0])
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "one"))


def test_a_killed_refit_goes_on(
    folders: list[Path], data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, Any] = {"held_out": 0.25, "lambdas": [0.1, 1.0, "inf"]}
    merge(folders, data, tmp_path / "expected", **grid)
    write, run = FittedWriter.write, Fit.run
    done: list[float] = []

    def cut(self: FittedWriter, name: str, *args: Any) -> None:
        if self._folder.name == "1" and len(self.names) == 5:
            raise Killed
        write(self, name, *args)

    def count(self: Fit) -> list[float] | None:
        done.append(self.lambda_)
        return run(self)

    monkeypatch.setattr(FittedWriter, "write", cut)
    monkeypatch.setattr(Fit, "run", count)
    with pytest.raises(Killed):
        merge(folders, data, tmp_path / "out", **grid)
    assert done == [float("inf"), float("inf"), 0.1, 1.0] and not (tmp_path / "out").exists()
    monkeypatch.setattr(FittedWriter, "write", write)
    done.clear()
    merge(folders, data, tmp_path / "out", **grid)
    assert 0.1 not in done
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "expected"))
    assert read_record(tmp_path / "out")["stitch"] == read_record(tmp_path / "expected")["stitch"]


def test_few_held_out_inputs_are_warned_of(tmp_path: Path) -> None:
    unknown = {"a": OpenSet(LocalizationSet(ref="org/texts"), repo="org/texts")}
    assert not Refit().warnings(unknown) and not Refit(inputs=128).warnings(unknown)
    assert "held-out inputs (16 of a)" in Refit(inputs=64).warnings(unknown)[0]
    assert not Refit(inputs=64, lambdas=(1.0,)).warnings(unknown)
    short = {**unknown, "b": open_set(LocalizationSet(ref=str(write_texts(tmp_path / "40.jsonl", 40))))}
    assert "held-out inputs (10 of b)" in Refit().warnings(short)[0]


def test_bfloat16_is_rounded_once(tmp_path: Path, data: list[str]) -> None:
    folders = family(build("llama", torch.bfloat16), tmp_path)
    merge(folders, data, tmp_path / "out")
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    merged, mean = load(tmp_path / "out"), load(tmp_path / "mean")
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert any(not torch.equal(merged[name], mean[name]) for name in merged)


def test_the_command_records_and_repeats(
    folders: list[Path], data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("how.yaml").write_text(yaml.safe_dump({"stitch": {**SMALL, "lambdas": [0.1, "inf"]}}))
    common = ["merge", "how.yaml", "--base", "./base", "--ft", "./ft0", "./ft1", "--density", "0.3"]
    common += ["--stitch", "refit", "--no-figures", "--data", *(f"./{Path(path).name}" for path in data)]
    assert main([*common, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "stitch     refit on up to 18 inputs per finetune" in said
        and "fitting    at most about" in said
        and "1.jsonl" in said
    )
    assert "warning    lambda is chosen on few held-out inputs (6 of ft0, 6 of ft1)" in said
    assert main([*common, "--dry-run", "--json"]) == 0
    refitting = json.loads(capsys.readouterr().out)["refitting"]
    assert refitting["inputs"] == 48
    write_texts(Path("1.jsonl"), 10, seed=1)
    assert main([*common, "--dry-run", "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)["refitting"]
    assert fewer["inputs"] == 24 + 10 and fewer["tokens"] < refitting["tokens"] and fewer["flops"] < refitting["flops"]
    write_texts(Path("1.jsonl"), seed=1)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        assert main([*common, "--dry-run"]) == 0
        assert "of memory in each of 2 processes" in capsys.readouterr().out
    assert main([*common, "--out", "out", "--quiet"]) == 0
    card = Path("out/README.md").read_text()
    assert "## Refitted values" in card and "0.jsonl" in card and "lambda 0.1" in card and str(tmp_path) not in card
    record = read_record(Path("out"))
    assert record["stitch"]["lambda"] == "0.1" and len(record["stitch"]["data"]["ft0"]["sha256"]) == 64
    assert record["data"] == {} and "found with these localization sets" not in card
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    assert read_record(Path("again"))["outputs"]["model.safetensors"] == record["outputs"]["model.safetensors"]
    verify = ["verify", "out", "--base", "./base", "--ft", "./ft0", "./ft1", "--tensors", "all"]
    assert main(verify) == 0, capsys.readouterr().err
    assert "refitted" in capsys.readouterr().err
    state = load(Path("out"))
    state["model.layers.0.mlp.up_proj.weight"].view(-1)[:] += 1
    save_file(state, Path("out/model.safetensors"), metadata={"format": "pt"})
    assert main([*verify, "--quiet"]) == 1
    assert "model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": []}, "a refit without data has no inputs: give --data, or drop the setting"),
    ({"method": "ties"}, "needs method locstitch, not ties"),
    ({"allow_non_finite": True}, "cannot be combined with a refit"),
    ({"cache": False}, "cannot be combined with --no-cache"),
    ({"stitch": {"inputs": 1}}, "held_out 0.25 of 1 input is none"),
    ({"stitch": {"lambdas": [0, 0]}}, "lambdas must be distinct"),
    ({"stitch": {"lambda": 3}}, "did you mean 'lambdas'"),
    ({"stitch": "refitted"}, "stitch"),
    ({"include": ["*norm*"]}, "there is nothing to refit"),
    ({"stitch": {"data": {"other": "a.jsonl"}}}, "a refit needs one --data entry"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_refused_before_anything_is_written(
    fields: dict[str, Any], said: str, folders: list[Path], data: list[str], tmp_path: Path
) -> None:
    asked = {"localizer": HOW, "data": data, "stitch": {"inputs": 8}, **fields}
    if "method" in fields:
        del asked["localizer"]
    with pytest.raises(RequestError, match=said):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def put(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    state = load(folder)
    change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("victim", "said"), [(0, "the merged model"), (1, "the finetuned model")])
def test_nan_activations(victim: int, said: str, folders: list[Path], data: list[str], tmp_path: Path) -> None:
    """In a tensor that no mask looks at."""
    put(folders[victim], "model.embed_tokens.weight", lambda tensor: tensor.fill_(torch.nan))
    with pytest.raises(RequestError, match=rf"on the inputs of ft0, the \w+ of {said}.* contain NaN"):
        merge(folders, data, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_few_tokens_are_told_of(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    merge(folders, data, tmp_path / "out", inputs=3)
    (note,) = read_record(tmp_path / "out")["stitch"]["notes"]
    assert "down_proj.weight" in note and "for 48" in note and "lambda 0.1 and ridge 0.01" in note
    assert note in (tmp_path / "out" / "README.md").read_text()
