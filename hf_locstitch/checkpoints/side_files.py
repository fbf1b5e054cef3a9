"""The files beside the weights: config, tokenizer, processor, chat templates, licence. Copied byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_locstitch.checkpoints.source import Source

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".npz", ".npy", ".pkl", ".mlmodel", ".mlpackage",
)  # fmt: skip
# Rewritten for a merge, or describing a different model.
NOT_COPIED = frozenset({
    "README.md", "locstitch.yaml", "locstitch.json", "trainer_state.json", "training_args.json",
    "all_results.json", "train_results.json", "eval_results.json", "adapter_config.json",
})  # fmt: skip
NOT_COPIED_FOLDERS = frozenset({"masks", "values", "figures", "runs", "onnx", "openvino", "coreml", "original"})


def side_files(files: Sequence[str]) -> list[str]:
    """Which of a checkpoint's files go along with its weights."""
    return [
        file
        for file in files
        if not file.endswith((*WEIGHTS, ".index.json"))
        and file not in NOT_COPIED
        and not any(part.startswith(".") for part in file.split("/"))
        and file.split("/")[0] not in NOT_COPIED_FOLDERS
        and not file.rsplit("/", 1)[-1].startswith("events.out.tfevents")
    ]


def copy_side_files(source: Source, folder: Path, dtype: str) -> None:
    """Copy into `folder`. They stay unchanged, except that config.json gets `dtype` unless that is "auto"."""
    for file in side_files(list(source.files)):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.fetch(file), target)
    config = folder / "config.json"
    if dtype != "auto" and config.exists():
        config.write_text(_with_dtype(config.read_text(encoding="utf-8"), dtype), encoding="utf-8")


def _with_dtype(config: str, dtype: str) -> str:
    fields = json.loads(config)
    fields.pop("torch_dtype", None)
    fields["dtype"] = dtype
    return json.dumps(fields, indent=2) + "\n"
