"""A refit of every weight of the blocks: density 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import State, load
from helpers.refits import read_record

from hf_locstitch import load_mask
from hf_locstitch.cli.main import main

STIFFNESS, RIDGE = 0.1, 0.01
FIRST = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def first_inputs(embeddings: torch.Tensor, scale: torch.Tensor, texts: Path) -> torch.Tensor:
    """What enters the first linear, of all tokens, [tokens, hidden]: embeddings, normed."""
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokens = torch.cat([torch.tensor(make_tokenizer()(row)["input_ids"]) for row in rows])
    hidden = embeddings[tokens].double()
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()


def first_refitted(base: State, finetuned: list[State], texts: list[Path]) -> torch.Tensor:
    """The first linear's weights in closed form, from the plain mean."""
    mean = {name: torch.stack([state[name].double() for state in finetuned]).mean(0) for name in (FIRST, NORM)}
    gram, cross = torch.zeros(32, 32).double(), torch.zeros(mean[FIRST].shape).double()
    for state, file in zip(finetuned, texts, strict=True):
        x = first_inputs(base["model.embed_tokens.weight"], mean[NORM], file)
        own = first_inputs(base["model.embed_tokens.weight"], state[NORM], file)
        rest = own @ state[FIRST].double().T - x @ mean[FIRST].T
        gram += x.T @ x / len(x)
        cross += rest.T @ x / len(x)
    diagonal = gram.diagonal()
    system = gram + torch.diag(STIFFNESS * diagonal + RIDGE * diagonal.mean())
    return (mean[FIRST] + cross @ torch.linalg.inv(system)).float()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    family(build("llama", torch.float32), tmp_path)
    texts = [write_texts(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(2)]
    how = {"start": "mean", "held_out": 0, "lambdas": [STIFFNESS], "ridge": RIDGE, "steps": 60, "batch": 5}
    Path("how.yaml").write_text(yaml.safe_dump({"stitch": how}))
    inputs = ["--base", "./base", "--ft", "./ft0", "./ft1"]
    asked = ["merge", "how.yaml", *inputs, "--density", "1", "--quiet", "--data", "./0.jsonl", "./1.jsonl",
             "--no-figures"]  # fmt: skip
    assert main([*asked, "--method", "locstitch", "--stitch", "refit", "--out", "out"]) == 0
    merged, base, finetuned = load(Path("out")), load(Path("base")), [load(Path("ft0")), load(Path("ft1"))]
    record = read_record(Path("out"))
    assert record["covered_by"] == [0, 0, record["N"]]
    assert all(bool(mask.all()) for mask in load_mask("out", "ft0").values())
    linears = {name for name, values in base.items() if ".layers." in name and values.dim() == 2}
    assert set(record["stitch"]["refitted"]) == linears and not record["stitch"]["kept_plain"]
    for name, values in merged.items():
        mean = (finetuned[0][name].double() + finetuned[1][name].double()).div(2).float()
        assert torch.equal(values, mean if ".layers." in name else base[name]) == (name not in linears), name
    assert torch.allclose(merged[FIRST], first_refitted(base, finetuned, texts), atol=1e-5)
    assert main(["verify", "out", *inputs, "--tensors", "all"]) == 0, capsys.readouterr().err
