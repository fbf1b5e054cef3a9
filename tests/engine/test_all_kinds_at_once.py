"""A LoRA, a DoRA and a full finetune with tokens and a chat template of its own, merged in one command; and so over a
base without a head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import save_lora
from helpers.models import load
from helpers.vocabularies import family
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_locstitch import verify
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub


def headless(base: Path, folder: Path) -> Path:
    """The base as its model without a head is saved: other names, and the head is its embeddings."""
    shutil.copytree(base, folder)
    model = AutoModel.from_pretrained(base)
    model.save_pretrained(folder)
    assert "embed_tokens.weight" in load(folder)
    return folder


@pytest.mark.parametrize("head", [True, False], ids=["with a head", "headless"])
def test_from_the_hub_to_the_hub(head: bool, tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = family(tmp_path, tied=not head)
    made = {
        "base": folders["base"] if head else headless(folders["base"], tmp_path / "headless"),
        "math": folders["math"],
        "lora": save_lora(tmp_path / "lora", folders["base"]),
        "dora": save_lora(tmp_path / "dora", folders["base"], seed=1, use_dora=True),
    }
    for name, folder in made.items():
        home_hub.add_repo(f"kinds/{name}", {file.name: file for file in folder.iterdir() if file.name != "README.md"})
    finetuned = ["kinds/lora", "kinds/dora", "kinds/math"]
    command = ["merge", "--base", "kinds/base", "--ft", *finetuned, "--density", "0.3", "--push-to", "demo/kinds"]
    assert main([*command, "--quiet"]) == 0

    pushed = Path(snapshot_download("demo/kinds"))
    assert head or not any(name.startswith("model.") or "lm_head" in name for name in load(pushed))
    assert verify(pushed, tensors="all").ok
    tokenizer, model = AutoTokenizer.from_pretrained(pushed), AutoModelForCausalLM.from_pretrained(pushed)
    prompt = tokenizer.apply_chat_template([{"content": "w3 sum w4"}], tokenize=False)
    assert prompt == "<|im_start|>w3 sum w4<|im_end|>"
    ids = tokenizer(prompt.replace("<|im_end|>", " <|im_end|>"), return_tensors="pt").input_ids
    assert tokenizer.unk_token_id not in ids and ids.max() >= 24, "the new tokens are known"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert torch.isfinite(model(ids).logits).all() and model(ids).logits.shape[-1] == 27
