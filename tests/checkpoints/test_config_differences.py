"""What differs between a base's and a finetune's small files, and changes what a merge of them does, is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import finetune, random_state, save

from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe

CONFIG = {
    "model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": None, "eos_token_id": 2,
    "transformers_version": "5.0.0", "attention_dropout": 0.0, "use_cache": True, "vocab_size": 11,
}  # fmt: skip
FILES = {
    "generation_config.json": {"eos_token_id": 2},
    "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>"}, {"content": "a"}]},
    "tokenizer_config.json": {"tokenizer_class": "X"},
}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    state = random_state(0)
    made = [
        save(tmp_path / "base", state, json.dumps(CONFIG)),
        save(tmp_path / "ft", finetune(state, 1), json.dumps(CONFIG)),
    ]
    for folder in made:
        for file, content in FILES.items():
            (folder / file).write_text(json.dumps(content))
    return made


def warnings(folders: list[Path], **fields: Any) -> list[str]:
    plan = make_plan(make_recipe({"base": str(folders[0]), "finetuned": [str(folders[1])], **fields}))
    return [warning for warning in plan.warnings if warning.endswith("is kept.")]


def test_nothing_is_said_of_what_is_alike_or_does_not_matter(folders: list[Path]) -> None:
    (folders[1] / "config.json").write_text(
        json.dumps({**CONFIG, "transformers_version": "4.0.0", "attention_dropout": 0.1, "use_cache": False, "new": 1})
    )
    assert warnings(folders) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rope_parameters": {"rope_theta": 2e7, "rope_type": "default"}}, ["rope_theta 20000000.0, the base's 1"]),
        ({"rope_parameters": None, "rope_theta": 2e7}, ["rope_theta 20000000.0, the base's 10000.0"]),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, ["num_attention_heads 8", "num_key_value_heads 4"]),
        ({"hidden_act": "gelu"}, ['hidden_act "gelu", the base\'s "silu"']),
        ({"rms_norm_eps": 0.1, "sliding_window": 16}, ["rms_norm_eps 0.1", "sliding_window 16, the base's null"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_one_line_for_each_setting_that_differs(folders: list[Path], changed: dict[str, Any], said: list[str]) -> None:
    config = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    (folders[1] / "config.json").write_text(json.dumps(config))
    found = warnings(folders)
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True)), found
    assert all(line.startswith("ft's config") and "the base's is kept" in line for line in found)
    assert all("ft's is kept" in line for line in warnings(folders, files_from="ft"))


def write(file: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write("generation_config.json", {"eos_token_id": [1, 300]}), "ends its answers with the tokens [1, 300]"),
        (write("chat_template.jinja", "{{ messages }}"), "ft has a chat template, the base none"),
        (write("tokenizer_config.json", {"chat_template": "{{ messages }}"}), "ft has a chat template, the base none"),
        (write("tokenizer.json", {"model": {"vocab": {"a": 0}}}), "ft's tokenizer has 1 tokens, the base's 3"),
        (write("tokenizer.json", {"model": {"vocab": [["a", -1.0]]}}), "ft's tokenizer has 1 tokens, the base's 3"),
    ],
    ids=["eos", "template", "template in the config", "vocabulary", "unigram"],
)
def test_texts(folders: list[Path], change: Callable[[Path], object], words: str) -> None:
    change(folders[1])
    (found,) = warnings(folders)
    assert words in found


def test_other_templates_and_damaged_files(folders: list[Path]) -> None:
    for folder, text in zip(folders, ("{{ a }}", "{{ b }}"), strict=True):
        (folder / "chat_template.jinja").write_text(text)
    assert "another chat template" in warnings(folders)[0]
    shutil.copy(folders[0] / "chat_template.jinja", folders[1])
    (folders[1] / "tokenizer.json").write_text("{")
    assert warnings(folders) == []
