"""Grafted models that are set up for passes, with the task of each objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo.skills import make_tokenizer

from helpers.architectures import blocks
from helpers.data import ROWS, WORDS
from helpers.families import masked_tokenizer
from helpers.models import State, load
from hf_locstitch.localize.grafted_model import GraftedModel, make_grafted_model
from hf_locstitch.tasks.loading import load_config, load_model
from hf_locstitch.tasks.objectives.causal_lm import CausalLM
from hf_locstitch.tasks.objectives.clip_zero_shot import ClipZeroShot
from hf_locstitch.tasks.objectives.image_classification import ImageClassification
from hf_locstitch.tasks.objectives.masked_lm import MaskedLM
from hf_locstitch.tasks.objectives.sequence_classification import SequenceClassification
from hf_locstitch.tasks.objectives.text_zero_shot import TextZeroShot
from hf_locstitch.tasks.task import Task


def open_grafted(
    folders: tuple[Path, Path], objective: Any, names: Sequence[str] | None = None
) -> tuple[GraftedModel, Any]:
    """The grafted model, and the base model for objectives that look at it."""
    base_folder, folder = folders
    state: State = load(folder)
    dtype = next(iter(state.values())).dtype
    config = partial(load_config, base_folder if objective.base_config else folder)
    finetuned, _ = load_model(folder, objective, config(), dtype)
    base, absent = load_model(base_folder, objective, config(), dtype)
    localized = names if names is not None else blocks(state)
    cpu = torch.device("cpu")
    return make_grafted_model(finetuned, base, absent, list(state), localized, state.__getitem__, cpu, "ft"), base


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


def text_rows(classes: int) -> list[dict[str, Any]]:
    return [{"text": text, "label": number % classes} for number, text in enumerate(WORDS)]


# kind -> the objective, its rows, its processor
Case = tuple[str, Any, Callable[[], list[dict[str, Any]]], Callable[[], Any]]
IMAGES = [{"image": FakeImage(seed), "label": seed % 3} for seed in range(5)]
CASES: dict[str, Case] = {
    "causal-lm": ("llama", CausalLM(), lambda: ROWS, make_tokenizer),
    "text": ("llama", CausalLM(), lambda: [{"text": text} for text in WORDS], make_tokenizer),
    "tied": ("llama-tied", CausalLM(), lambda: ROWS, make_tokenizer),
    "gpt2": ("gpt2", CausalLM(), lambda: ROWS, make_tokenizer),
    "mixtral": ("mixtral", CausalLM(), lambda: ROWS, make_tokenizer),
    "qwen3-moe": ("qwen3-moe", CausalLM(), lambda: ROWS, make_tokenizer),
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
    grafted, base = open_grafted(folders, objective, names)
    return grafted, objective.prepare(rows(), processor(), base)
