"""A tiny base with two finetunes, and unlabelled texts: what refits are tested on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from demo.skills import make_tokenizer
from test_with_data import write_jsonl

from hf_locstitch import Magnitude
from hf_locstitch.checkpoints.localizable import BLOCKS

HOW = Magnitude(density=0.3)
SMALL: dict[str, Any] = {"inputs": 24, "held_out": 0.25, "batch": 5}


def family(model: Any, root: Path, tokenizer: Any = None) -> list[Path]:
    """A base and two finetunes of its blocks, saved with a tokenizer."""
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folders = [root / "base", root / "ft0", root / "ft1"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                step = 0.02 * torch.randn_like(parameter) if seed and BLOCKS.search(name) else 0.0
                parameter.copy_(start[name] + step)
        model.save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folders


def write_texts(path: Path, number: int = 24, *, seed: int = 0) -> Path:
    """Texts of unequal lengths, without labels."""
    letters = random.Random(seed)
    rows = [{"text": "".join(letters.choices("abcdef0123=", k=letters.randint(5, 14)))} for _ in range(number)]
    return write_jsonl(path, rows)


def read_record(out: Path) -> dict[str, Any]:
    return json.loads((out / "locstitch.json").read_text())
