"""How a model is used stands first on its card, and what stands there runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.architectures import T5, TEXT, save_family
from helpers.language_models import WORDS, favouring, make_tokenizer
from helpers.models import finetune, load
from helpers.runs import quick_localize, quick_merge
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto

from hf_locstitch import merge_from_hub
from hf_locstitch.report.usage import HEADS, model_class, usage


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def before(card: str, *parts: str) -> bool:
    """Whether the card has these parts, in this order."""
    places = [card.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def add_tokenizer(folder: Path, template: str | None = None) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.add_special_tokens({"mask_token": "D", "pad_token": "<unk>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def words(folder: Path, template: str | None = None) -> list[Path]:
    folders = [favouring(folder / name, name.upper(), seed=seed) for seed, name in enumerate(("a", "b"))]
    add_tokenizer(folders[0], template)
    return folders


def chats(folder: Path) -> list[Path]:
    return words(folder, "{% for turn in messages %}{{ turn.content }} {% endfor %}")


def texts(auto: str, config: Callable[[], Any]) -> Callable[[Path], list[Path]]:
    """A base with a tokenizer, and a finetune of it."""

    def build(folder: Path) -> list[Path]:
        torch.manual_seed(0)
        getattr(transformers, auto).from_config(config()).save_pretrained(folder / "base")
        add_tokenizer(folder / "base")
        (folder / "ft").mkdir()
        (folder / "ft" / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        save_file(finetune(load(folder / "base"), 1), folder / "ft" / "model.safetensors", metadata={"format": "pt"})
        return [folder / "base", folder / "ft"]

    return build


def images(folder: Path) -> list[Path]:
    from PIL import Image

    folders = save_family("ViTForImageClassification", folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folders[0])
    Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8)).save(folder / "image.jpg")
    return folders


SIZES: dict[str, Any] = {**TEXT, "vocab_size": len(WORDS)}
T5_SIZES: dict[str, Any] = {**T5, "vocab_size": len(WORDS)}
CASES: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "chat": (chats, "LlamaForCausalLM"),
    "words": (words, "LlamaForCausalLM"),
    "classifier": (
        texts("AutoModelForSequenceClassification", lambda: transformers.BertConfig(**SIZES)),
        "BertForSequenceClassification",
    ),
    "masked": (texts("AutoModelForMaskedLM", lambda: transformers.BertConfig(**SIZES)), "BertForMaskedLM"),
    "seq2seq": (
        texts("AutoModelForSeq2SeqLM", lambda: transformers.T5Config(**T5_SIZES)),
        "T5ForConditionalGeneration",
    ),
    "images": (images, "ViTForImageClassification"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_code_on_the_card_runs(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a local folder, which the card calls DIR."""
    build, named = CASES[case]
    base, *finetuned = build(tmp_path)
    quick_merge(base, finetuned, out=tmp_path / "DIR", localizer={"density": 0.5})
    card = (tmp_path / "DIR" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    blocks = python_blocks(card)
    for block in blocks:
        exec(compile(block, "card", "exec"), names)
    assert len(blocks) == 2 and type(names["model"]).__name__ == named
    assert capsys.readouterr().out and f"# {names['kept']:,}" in blocks[1]
    assert ("apply_chat_template" in card) == (case == "chat")
    assert ("vllm serve" in card) == ("convert_hf_to_gguf" in card) == (case in ("chat", "words"))
    assert before(card, "# ", "## Use", "from_pretrained", "## Made from", "## Masks", "## Settings")
    assert before(card, "## Settings", "## Reproduce", "<summary>The recipe", "## Verify", "## Citation")
    assert "from_pretrained" in "\n".join(card.split("---\n", 2)[2].splitlines()[:25])


def test_the_code_of_a_localized_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = words(tmp_path)
    quick_localize(base, ft, out=tmp_path / "DIR", localizer={"density": 0.5})
    card = (tmp_path / "DIR" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in python_blocks(card):
        exec(compile(block, "card", "exec"), names)
    assert names["localized"].shapes and names["mask"].dtype == torch.bool
    assert before(card, "hf-locstitch stitch", "load_localized", "## Made from", "## Masks", "## Verify")


def test_the_picture_is_at_the_top_and_the_recipe_in_the_page(tmp_path: Path) -> None:
    base, ft = words(tmp_path)
    merge_from_hub(base, [ft], out=tmp_path / "out", localizer={"density": 0.5})
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert before(card, "# b", '<img src="figures/layers.png" width="', "## Use", "figures/places.png")
    assert (tmp_path / "out" / "locstitch.yaml").read_text().rstrip() in card
    assert card.count("<details>") == card.count("</details>") == 2


EXCEPTIONS = {"Mistral4ForCausalLM"}  # reads images, too
SOUNDS = {"feat_extract_activation": "gelu"}


@pytest.mark.parametrize("automatic", sorted({*HEADS.values()}))
def test_automatic_classes_are_those_of_transformers(automatic: str) -> None:
    """Every architecture that ends as the class's do is in its list."""
    lists: dict[str, Any] = {
        name: getattr(modeling_auto, name)._model_mapping._model_mapping for name in HEADS.values()
    }
    known = {name: {one for entry in listed.values() for one in ([entry] if isinstance(entry, str) else entry)}
             for name, listed in lists.items()}  # fmt: skip
    of_sounds = known["AutoModelForAudioClassification"]
    for name in set.union(*known.values()) - EXCEPTIONS:
        config = {"architectures": [name], **(SOUNDS if name in of_sounds else {})}
        if model_class(config) == automatic:
            assert name in known[automatic]


@pytest.mark.parametrize(
    ("architecture", "config", "due"),
    [
        ("Qwen2VLForConditionalGeneration", {"vision_config": {"depth": 2}}, "AutoModelForImageTextToText"),
        ("MT5ForConditionalGeneration", {"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        ("WhisperForConditionalGeneration", {"is_encoder_decoder": True}, "WhisperForConditionalGeneration"),
        ("GPT2LMHeadModel", {}, "AutoModelForCausalLM"),
        ("FlaubertWithLMHeadModel", {}, "FlaubertWithLMHeadModel"),
        ("BertForPreTraining", {}, "BertForPreTraining"),
        ("BertModel", {}, "AutoModel"),
        ("x; import os", {}, "AutoModel"),
        (None, {}, "AutoModel"),
    ],
)
def test_model_class(architecture: str | None, config: dict[str, Any], due: str) -> None:
    assert model_class({**config, "architectures": [architecture]}) == due and (
        due == "AutoModel" or hasattr(transformers, due)
    )


@pytest.mark.parametrize(
    ("architecture", "files", "due"),
    [
        ("LlamaForCausalLM", ["tokenizer.json"], "AutoTokenizer"),
        ("LlamaForCausalLM", ["config.json"], None),
        ("ViTForImageClassification", ["preprocessor_config.json"], "AutoImageProcessor"),
        ("ViTForImageClassification", ["tokenizer.json"], None),
        ("BertForTokenClassification", ["tokenizer.json"], None),  # no example is shown
    ],
)
def test_an_example_needs_its_files(architecture: str, files: Sequence[str], due: str | None) -> None:
    assert usage({"architectures": [architecture]}, files).processor == due
