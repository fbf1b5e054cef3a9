"""Configs that leave the number of tokens to a class: parts were long written without defaults, as Gemma 3's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.models import load
from helpers.runs import quick_merge
from helpers.vocabularies import tokenizer
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from hf_locstitch.checkpoints.vocabulary import resized

ROWS = 262_208  # the default of Gemma 3's text


def test_where_it_is_written() -> None:
    assert resized({"text_config": {"hidden_size": 8}}, {5}, 7) == {"text_config": {"hidden_size": 8, "vocab_size": 7}}
    assert resized({"text_config": {"vocab_size": 5}}, {5}, 7) == {"text_config": {"vocab_size": 7}}
    assert resized({"hidden_size": 8}, {5}, 7) == {"hidden_size": 8}  # nobody knows that it has tokens


def save(folder: Path, rows: int, base: Gemma3ForConditionalGeneration | None = None) -> Gemma3ForConditionalGeneration:
    text = {
        "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 2, "vocab_size": rows,
    }  # fmt: skip
    vision = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 4, "patch_size": 2}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)  # type: ignore[arg-type]
    model = Gemma3ForConditionalGeneration(config)
    if base is not None:
        with torch.no_grad():
            for own, theirs in zip(model.parameters(), base.parameters(), strict=True):
                count = min(len(own), len(theirs))
                own[:count] = theirs[:count] + 0.01
    model.save_pretrained(folder)
    return model


def test_new_tokens_where_the_config_states_no_number(tmp_path: Path) -> None:
    base = save(tmp_path / "base", ROWS)
    save(tmp_path / "ft", ROWS + 2, base)
    tokenizer().save_pretrained(tmp_path / "base")
    tokenizer(plain=["sum"]).save_pretrained(tmp_path / "ft")
    file = tmp_path / "base" / "config.json"
    stated = json.loads(file.read_text())
    stated["text_config"] = {key: value for key, value in stated["text_config"].items() if key != "vocab_size"}
    file.write_text(json.dumps(stated))
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", exclude=["*vision*", "*projector*"])
    model, found = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["mismatched_keys"] and not found["missing_keys"]
    number = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("sum")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ft").convert_tokens_to_ids("sum")
    name = next(name for name in load(tmp_path / "ft") if name.endswith("embed_tokens.weight"))
    assert torch.equal(model.get_input_embeddings().weight[number], load(tmp_path / "ft")[name][theirs])
