"""Tiny transformers models, a base and a finetune of each, saved on the spot and set up for passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from demo.skills import make_tokenizer
from models import State, load
from test_architectures import MOE, TEXT, VISION, blocks

from hf_locstitch.localize.grafted_model import GraftedModel, make_grafted_model
from hf_locstitch.tasks.loading import load_config, load_model
from hf_locstitch.tasks.objective import class_loss
from hf_locstitch.tasks.objectives.causal_lm import CausalLM
from hf_locstitch.tasks.objectives.clip_zero_shot import ClipZeroShot
from hf_locstitch.tasks.objectives.image_classification import ImageClassification
from hf_locstitch.tasks.objectives.masked_lm import MaskedLM
from hf_locstitch.tasks.objectives.sequence_classification import SequenceClassification
from hf_locstitch.tasks.objectives.text_zero_shot import TextZeroShot
from hf_locstitch.tasks.task import Task

VOCABULARY = len(make_tokenizer())
TOKENS = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": 0}
LLAMA = {**TOKENS, "num_key_value_heads": 2}
EXPERTS = {**MOE, "vocab_size": VOCABULARY, "pad_token_id": 0}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", TOKENS),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", {**TOKENS, "num_labels": 3}),
    "bert": ("BertModel", "BertConfig", TOKENS),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 3}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TOKENS, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
    ),
}


def build(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    name, config_class, fields = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**fields, **options)
    return getattr(transformers, name)(config).to(dtype).eval()


def pair(kind: str, root: Path, dtype: torch.dtype = torch.float64, step: float = 0.05) -> tuple[Path, Path]:
    """A base and a finetune of all its parameters, saved as transformers saves them."""
    model = build(kind, dtype)
    model.save_pretrained(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn_like(parameter))
    model.save_pretrained(root / "ft")
    for folder in (root / "base", root / "ft"):
        make_tokenizer().save_pretrained(folder)
    return root / "base", root / "ft"


def open_subject(
    folders: tuple[Path, Path], objective: Any, names: Sequence[str] | None = None
) -> tuple[GraftedModel, Any]:
    """The subject, and the base model for objectives that look at it."""
    base_folder, folder = folders
    state: State = load(folder)
    dtype = next(iter(state.values())).dtype
    config = partial(load_config, base_folder if objective.base_config else folder)
    finetuned, _ = load_model(folder, objective, config(), dtype)
    base, absent = load_model(base_folder, objective, config(), dtype)
    localized = names if names is not None else blocks(state)
    cpu = torch.device("cpu")
    return make_grafted_model(finetuned, base, absent, list(state), localized, state.__getitem__, cpu, "ft"), base


WORDS = ["copy cable=cable", "reverse 40718=81704", "swap CABLE=ACLBE", "rotate cable=ablec", "next 12345=23456"]


class FakeImage:
    """Stands in for a picture: its pixels are drawn by the processor below."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def convert(self, mode: str) -> FakeImage:
        assert mode == "RGB"
        return self


class FakeProcessor:
    """Noise for pixels; a real image processor is tested where the whole job is."""

    image_processor: Any
    tokenizer: Any

    def __init__(self) -> None:
        self.image_processor, self.tokenizer = self, make_tokenizer()

    def __call__(self, images: FakeImage, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(images.seed))}


def masked_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.mask_token = "?"
    return tokenizer


def causal_rows() -> list[dict[str, Any]]:
    return [{"prompt": text.split("=")[0] + "=", "completion": text.split("=")[1]} for text in WORDS]


def text_rows(classes: int) -> list[dict[str, Any]]:
    return [{"text": text, "label": number % classes} for number, text in enumerate(WORDS)]


# kind -> the objective, its rows, its processor
Case = tuple[str, Any, Callable[[], list[dict[str, Any]]], Callable[[], Any]]
IMAGES = [{"image": FakeImage(seed), "label": seed % 3} for seed in range(5)]
CASES: dict[str, Case] = {
    "causal-lm": ("llama", CausalLM(), causal_rows, make_tokenizer),
    "text": ("llama", CausalLM(), lambda: [{"text": text} for text in WORDS], make_tokenizer),
    "tied": ("llama-tied", CausalLM(), causal_rows, make_tokenizer),
    "gpt2": ("gpt2", CausalLM(), causal_rows, make_tokenizer),
    "mixtral": ("mixtral", CausalLM(), causal_rows, make_tokenizer),
    "qwen3-moe": ("qwen3-moe", CausalLM(), causal_rows, make_tokenizer),
    "masked-lm": (
        "roberta-mlm",
        MaskedLM(template="{text}{mask}", label_words=("=", "a", "b")),
        lambda: text_rows(3),
        masked_tokenizer,
    ),
    "sequence-classification": ("bert-classes", SequenceClassification(), lambda: text_rows(3), make_tokenizer),
    "text-zero-shot": ("bert", TextZeroShot(classes=("abc", "def", "0123")), lambda: text_rows(3), make_tokenizer),
    "image-classification": ("vit", ImageClassification(), lambda: IMAGES, FakeProcessor),
    "clip-zero-shot": (
        "clip",
        ClipZeroShot(classes=("abc", "def", "0123"), prompt="{}"),
        lambda: IMAGES,
        FakeProcessor,
    ),
}


def prepare(case: str, folders: tuple[Path, Path], names: Sequence[str] | None = None) -> tuple[GraftedModel, Task]:
    _, objective, rows, processor = CASES[case]
    subject, base = open_subject(folders, objective, names)
    return subject, objective.prepare(rows(), processor(), base)


__all__ = ["CASES", "build", "class_loss", "open_subject", "pair", "prepare"]
