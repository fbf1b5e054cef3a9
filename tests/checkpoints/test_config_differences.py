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
    "generation_config.json": {"eos_token_id": 2, "bos_token_id": 1},
    "tokenizer.json": {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"content": "<s>", "id": 2}, {"content": "a", "id": 0}],
    },
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
    said = plan.notes if fields.get("tokenizer") else plan.warnings  # what was asked for is nothing to warn of
    return [line for line in said if "'s is kept" in line]


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
    assert all("ft was not trained" in line or "ends texts" in line for line in found)
    assert all("ft's is kept, " in line for line in warnings(folders, files_from="ft"))


ROPE = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}
LOCAL = {"rope_theta": 1e4, "rope_type": "default"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_parameters": ROPE}),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "s": [1, 2]}},
         {"rope_scaling": {"rope_theta": 1e6, "rope_type": "default", "s": [1, 2]}}),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
         {"rope_parameters": {"full_attention": ROPE, "sliding_attention": LOCAL}}),
        ({"rotary_pct": 0.25, "rotary_emb_base": 1e4},
         {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"}}),
        ({"use_sliding_window": False, "sliding_window": 64}, {"use_sliding_window": False, "sliding_window": None}),
        ({"hidden_act": "swish", "num_key_value_heads": None}, {"hidden_act": "silu", "num_key_value_heads": 4}),
        ({"hidden_size": 32, "head_dim": None}, {"hidden_size": 32, "head_dim": 8}),
        ({"eos_token_id": [2]}, {"eos_token_id": 2}),
        ({"torch_dtype": "bfloat16", "tokenizer_class": "LlamaTokenizer"}, {"dtype": "float32", "unsloth_fixed": True}),
    ],
    ids=["rope", "yarn", "mrope", "by layers", "partial", "window", "spellings", "head_dim", "eos", "noise"],
)  # fmt: skip
@pytest.mark.parametrize("part", [None, "text_config"])
def test_what_means_the_same_is_alike(
    folders: list[Path], old: dict[str, Any], new: dict[str, Any], part: str | None
) -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    for pair in ((old, new), (new, old)):
        for folder, changed in zip(folders, pair, strict=True):
            config = {**plain, part: {"num_attention_heads": 4, **changed}} if part else {**plain, **changed}
            (folder / "config.json").write_text(json.dumps(config))
        assert warnings(folders) == []


def test_scaled_positions_and_windows(folders: list[Path]) -> None:
    configs = (
        {"rope_theta": 1e4, "rope_scaling": None, "use_sliding_window": False, "sliding_window": 64},
        {"rope_parameters": {**ROPE, "rope_theta": 1e4}, "use_sliding_window": True, "sliding_window": 64},
    )
    for folder, config in zip(folders, configs, strict=True):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": config}))
    assert sorted(line.split(":")[0] for line in warnings(folders)) == [
        'ft\'s config has text_config.rope.rope_type "yarn", the base\'s "default"',
        "ft's config has text_config.sliding_window 64, the base's null",
    ]


def write(file: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            write("generation_config.json", {"eos_token_id": [300, 1], "bos_token_id": 1}),
            "ft ends its texts with the tokens 1, 300, the base with 2",
        ),
        (write("chat_template.jinja", "{{ messages }}"), "ft has a chat template, the base none"),
        (write("tokenizer_config.json", {"chat_template": "{{ messages }}"}), "ft has a chat template, the base none"),
        (write("tokenizer.json", {"model": {"vocab": {"a": 0}}}), "1 tokens, the base's 3; 2 fewer ('b', '<s>')"),
        (write("tokenizer.json", {"model": {"vocab": [["a", -1.0]]}}), "ft's tokenizer has 1 tokens, the base's 3"),
        (
            write("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 2, "<s>": 1}}}),
            "gives 2 of its 3 tokens other ids",
        ),
    ],
    ids=["eos", "template", "template in the config", "vocabulary", "unigram", "other ids"],
)
def test_texts(folders: list[Path], change: Callable[[Path], object], words: str) -> None:
    change(folders[1])
    (found,) = warnings(folders)
    assert words in found


def test_added_tokens_that_are_left_out(folders: list[Path]) -> None:
    """Unless they are, they are merged, and the plan says so."""
    added = [{"content": "<s>", "id": 2}, {"content": "<|im_end|>", "id": 3}]
    write("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added})(folders[1])
    (found,) = warnings(folders, tokenizer="base")
    assert "1 more ('<|im_end|>'): the base's is" in found
    assert warnings(folders) == []


def test_tokenizers_without_tokenizer_json(folders: list[Path]) -> None:
    """Are read by the same code as where tokens are matched."""
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    assert warnings(folders) == []
    (folders[1] / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2}))
    (found,) = warnings(folders, tokenizer="base")
    assert "ft's tokenizer has 3 tokens, the base's 2; 1 more ('<|im_end|>'): the base's is" in found


def test_other_templates_and_damaged_files(folders: list[Path]) -> None:
    for folder, text in zip(folders, ("{{ a }}", "{{ b }}"), strict=True):
        (folder / "chat_template.jinja").write_text(text)
    assert "another chat template" in warnings(folders)[0]
    shutil.copy(folders[0] / "chat_template.jinja", folders[1])
    (folders[1] / "tokenizer.json").write_text("{")
    assert warnings(folders) == []
