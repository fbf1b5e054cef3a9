"""A refit of a model that divides its weights in place as it runs."""

from __future__ import annotations

from pathlib import Path

import torch
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.models import load, same_bits
from helpers.refits import HOW, SMALL, read_record
from helpers.runs import quick_merge
from transformers import RwkvConfig, RwkvForCausalLM


def test_rwkv(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("base", "ft")]
    config = RwkvConfig(
        vocab_size=len(make_tokenizer()), context_length=64, hidden_size=16, num_hidden_layers=2, rescale_every=1
    )
    torch.manual_seed(0)
    model = RwkvForCausalLM(config)
    for folder in folders:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    before = [load(folder) for folder in folders]
    data = [str(write_texts(tmp_path / "texts.jsonl"))]
    quick_merge(
        folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, include=["*.blocks.*"],
        stitch={"method": "refit", **SMALL, "lambdas": [0.1, "inf"]},
    )  # fmt: skip
    assert read_record(tmp_path / "out")["stitch"]
    assert all(same_bits(load(folder), state) for folder, state in zip(folders, before, strict=True))
