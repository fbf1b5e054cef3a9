"""How a model is used stands first on its card, and what stands there runs."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.architectures import T5, TEXT, VISION, save_family
from helpers.language_models import WORDS, favouring, make_tokenizer
from helpers.models import finetune, load, save
from helpers.runs import quick_localize, quick_merge
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
        return with_finetune(folder)

    return build


def images(folder: Path) -> list[Path]:
    from PIL import Image

    folders = save_family("ViTForImageClassification", folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folders[0])
    Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8)).save(folder / "image.jpg")
    return folders


def write_sound(file: Path, rate: int = 8000) -> None:
    """A second of a tone, at another rate than models are trained with."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((8000 * np.sin(np.arange(rate) / 9)).astype("<i2").tobytes())


def with_finetune(folder: Path) -> list[Path]:
    """The base in a folder, and a finetune of it beside."""
    config = (folder / "base" / "config.json").read_text()
    return [folder / "base", save(folder / "ft", finetune(load(folder / "base"), 1), config)]


def sounds(model: Callable[[], Any], prepare: Callable[[Path], object]) -> Callable[[Path], list[Path]]:
    """prepare: saves what prepares the model's inputs."""

    def build(folder: Path) -> list[Path]:
        for needed in ("soundfile", "soxr"):  # of transformers, to read a sound
            pytest.importorskip(needed)
        torch.manual_seed(0)
        model().save_pretrained(folder / "base")
        prepare(folder / "base")
        write_sound(folder / "audio.wav")
        return with_finetune(folder)

    return build


def letters(folder: Path) -> None:
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B"]
    (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)


def speech(folder: Path) -> None:
    heard = transformers.WhisperFeatureExtractor(feature_size=8)
    tokenizer = transformers.WhisperTokenizer(vocab={word: n for n, word in enumerate(WORDS)}, merges=[])
    transformers.WhisperProcessor(heard, tokenizer).save_pretrained(folder)


def pictures(folder: Path) -> list[Path]:
    """A LLaVA that sees four patches, with a chat template."""
    from PIL import Image

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = transformers.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer), "num_key_value_heads": 2})
    vision, seen = transformers.CLIPVisionConfig(**VISION), {"image_token_index": len(WORDS), "image_seq_length": 4}
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, **seen)
    )
    model.save_pretrained(folder / "base")
    part = "{{ '<image> ' if part.type == 'image' else part.text }}"
    template = f"{{% for turn in messages %}}{{% for part in turn.content %}}{part}{{% endfor %}}{{% endfor %}}"
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "base")  # fmt: skip
    Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8)).save(folder / "image.jpg")
    return with_finetune(folder)


WAV2VEC2 = transformers.Wav2Vec2Config(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
    conv_kernel=(10, 10), conv_stride=(20, 20), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, vocab_size=7,
)  # fmt: skip
WHISPER = transformers.WhisperConfig(
    vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=16, bos_token_id=1,
    eos_token_id=2, pad_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
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
    "pictures": (pictures, "LlavaForConditionalGeneration"),
    "letters": (sounds(lambda: transformers.Wav2Vec2ForCTC(WAV2VEC2), letters), "Wav2Vec2ForCTC"),
    "sounds": (
        sounds(
            lambda: transformers.Wav2Vec2ForSequenceClassification(WAV2VEC2),
            lambda folder: transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder),
        ),
        "Wav2Vec2ForSequenceClassification",
    ),
    "speech": (
        sounds(lambda: transformers.WhisperForConditionalGeneration(WHISPER), speech),
        "WhisperForConditionalGeneration",
    ),
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
    assert ("apply_chat_template" in card) == (case in ("chat", "pictures"))
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
        ("Wav2Vec2ForCTC", ["preprocessor_config.json", "tokenizer_config.json"], "AutoProcessor"),
        ("Wav2Vec2ForCTC", ["preprocessor_config.json"], None),
        ("BertForTokenClassification", ["tokenizer.json"], None),  # no example is shown
    ],
)
def test_an_example_needs_its_files(architecture: str, files: Sequence[str], due: str | None) -> None:
    assert usage({"architectures": [architecture]}, files).processor == due
