"""Merges and localized checkpoints changed by somebody who also states the new hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def edit_manifest(merge: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((merge / "locstitch.json").read_text())
    change(record)
    (merge / "locstitch.json").write_text(json.dumps(record))


def adjust(merge: Path, *files: str) -> None:
    """State the present hashes of these files in the manifest."""

    def change(record: dict[str, Any]) -> None:
        for file in files:
            content = (merge / file).read_bytes()
            record["outputs"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_manifest(merge, change)


def replace_tensor(merge: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS) -> None:
    """change: from the tensor as it is."""
    from safetensors import safe_open

    with safe_open(merge / file, framework="pt") as opened:
        metadata = opened.metadata()
    state = {key: value.clone() for key, value in load_file(merge / file).items()}  # those in the file hold it open
    state[name] = change(state[name])
    save_file(state, merge / file, metadata=metadata)
    adjust(merge, file)
