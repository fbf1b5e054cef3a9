"""Load models, tokenizers and processors with transformers, wherever a checkpoint's files are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_locstitch.checkpoints.checkpoint import CONFIG, QUANTIZATION, Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.side_files import SideFiles, choose_side_files, copy_side_files
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.devices import AUTO, CPU, has_float64
from hf_locstitch.runtime.files import link, write_text
from hf_locstitch.tasks.custom_code import load_failure
from hf_locstitch.tasks.objective import Objective

WITHOUT_DATA = "A localizer that uses data needs it; use one without data."


def main_dtype(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype of most of their elements on disk."""
    counts: Counter[str] = Counter()
    for info in infos:
        counts[info.dtype] += info.numel
    return TORCH_DTYPE[counts.most_common(1)[0][0]]


def find_device(asked: str, *, float64: bool = False) -> torch.device:
    """asked: "auto", or a device as torch names it. float64: whether it must compute in that.

    "auto" is the accelerator (CUDA's, Apple's mps, Intel's xpu, or what else torch finds), this process's own under a
    launcher; the CPU where there is none, or it lacks float64. Raises RequestError if what is asked for is not here.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == CPU or (asked == AUTO and (present is None or (float64 and not has_float64(present)))):
        return torch.device(CPU)
    try:
        wanted = present if asked == AUTO else torch.device(asked)
    except RuntimeError as error:
        raise RequestError(f"device: torch knows no device {asked}. Use auto, cpu, cuda or cuda:1.") from error
    assert wanted is not None
    if present is None or wanted.type != present.type or (wanted.index or 0) >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        there = "no accelerator" if present is None else f"only {count} of {present.type}"
        raise RequestError(
            f"device: {asked} was requested, but torch {torch.__version__} finds {there}. Use --device auto or "
            "--device cpu (device: in a recipe)."
        )
    if float64 and not has_float64(wanted):
        raise RequestError(f"device: {asked} does not compute in float64, which is needed here. Use auto or cpu.")
    index = torch.accelerator.current_device_index() if wanted.index is None else wanted.index
    return torch.device(wanted.type, index)


def link_files(checkpoint: Checkpoint, folder: Path, weights: bool = True) -> Path:
    """Fill a folder that transformers can load: links, or what stands for them, to weights (if asked for), config and
    tokenizer. The config of weights that are dequantized says nothing of how they are stored."""
    source = checkpoint.source
    shards = [shard.file for shard in checkpoint.shards]
    indices = [file for file in source.files if file.endswith(".safetensors.index.json")]
    for file in [*(shards + indices if weights else ()), *choose_side_files(checkpoint).copied]:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        link(path, source.fetch(file).absolute())
    if checkpoint.dequantized:
        (folder / CONFIG).unlink()
        copy_side_files(checkpoint, SideFiles((CONFIG,)), folder, "auto")
    return folder


def load_model(
    folder: Path, objective: Objective, config: Any, dtype: torch.dtype, cure: str = WITHOUT_DATA
) -> tuple[Any, set[str]]:
    """A model on the CPU, and the parameters that the folder lacks. Code from a repo is never run.

    Raises RequestError that ends with `cure`.
    """
    import transformers

    loader = getattr(transformers, objective.auto_class)
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}  # grouped products lack float64
    try:
        model, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except (ValueError, OSError, KeyError) as error:
        raise RequestError(f"{objective.auto_class} cannot load the model ({load_failure(error)}). {cure}") from error
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    return model.eval(), absent


def load_config(folder: Path, called: str | None = None, cure: str = WITHOUT_DATA) -> Any:
    """called: what the folder is of, for messages; its name by default. Raises RequestError that ends with `cure`."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, RecursionError) as error:
        raise RequestError(
            f"transformers cannot read the config.json of {called or folder.name} ({load_failure(error)}). {cure}"
        ) from error


def config_of(fields: Mapping[str, Any], called: str, cure: str) -> Any:
    """The same from the fields of a config.json, as of weights that are not quantized. Raises RequestError."""
    with TemporaryDirectory() as folder:
        plain = {key: value for key, value in fields.items() if key != QUANTIZATION}
        write_text(Path(folder) / CONFIG, json.dumps(plain))
        return load_config(Path(folder), called, cure)


def load_processor(objective: Objective, *folders: Path) -> Any:
    """Tokenizer or image processor of the first folder that has one."""
    import transformers

    loader = getattr(transformers, objective.processor)
    errors = []
    for folder in folders:
        try:
            return loader.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
            errors.append(load_failure(error))
    raise RequestError(
        f"there is no tokenizer or processor that {loader.__name__} can read ({errors[0]}). Add its files to "
        "the finetune or the base."
    )
