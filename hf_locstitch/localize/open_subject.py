"""Both models of a finetune, loaded by transformers, and its examples: all that a pass needs, from open checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.side_files import side_files
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.data.objectives import suggest
from hf_locstitch.data.sets import OpenSet, read_rows
from hf_locstitch.data.task import Objective, Task
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.subject import Subject, keep_no_activations, load_config, load_model, make_subject
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.progress import no_bars_of_libraries
from hf_locstitch.refit.config import OnInputs


@no_bars_of_libraries()
def open_subject(
    how: WithData,
    name: str,
    base: CheckpointReader,
    finetuned: CheckpointReader,
    tensors: Sequence[TensorInfo],
    data: OpenSet,
    folder: Path,
) -> tuple[Subject, Task]:
    """Both models loaded by transformers, and the examples prepared for them."""
    checkpoint = finetuned.checkpoint
    objective: Objective = data.asked.objective or suggest(checkpoint.config, checkpoint.label)
    folder_base = link_files(base.checkpoint, folder / f"{name}.base")
    folder_finetuned = link_files(checkpoint, folder / f"{name}.finetuned")
    config = load_config(folder_base if objective.base_config else folder_finetuned)
    model, _ = load_model(folder_finetuned, objective, config, _dtype(checkpoint, tensors))
    original, absent = load_model(folder_base, objective, config, _dtype(base.checkpoint, tensors))
    processor = load_processor(objective, folder_finetuned, folder_base)
    task = objective.prepare(read_rows(data), processor, original)
    localized = [info.name for info in tensors]

    def on_disk(tensor: str) -> torch.Tensor:
        info = checkpoint.info(tensor)
        return finetuned.flat(tensor, 0, info.numel).view(info.shape)

    device, where = find_device(how), checkpoint.label
    subject = make_subject(model, original, absent, list(checkpoint.tensors), localized, on_disk, device, where,
                           how.sharded)  # fmt: skip
    if how.checkpointing:
        keep_no_activations(subject.model)
    return subject, task


def _dtype(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> torch.dtype:
    """That of most localized elements on disk."""
    counts: Counter[str] = Counter()
    for info in tensors:
        counts[checkpoint.info(info.name).dtype] += info.numel
    return TORCH_DTYPE[counts.most_common(1)[0][0]]


def find_device(how: WithData | OnInputs) -> torch.device:
    """Raises RequestError if there is no such device."""
    if how.device == "cpu" or (how.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RequestError("device: cuda is asked for, but torch finds no CUDA device. Use device: auto or cpu.")
    return torch.device("cuda", torch.cuda.current_device())


def link_files(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder as transformers loads it: links to weights, config and tokenizer, wherever they lie."""
    source = checkpoint.source
    shards = [shard.file for shard in checkpoint.shards]
    indices = [file for file in source.files if file.endswith(".safetensors.index.json")]
    for file in [*shards, *indices, *side_files(list(source.files))]:
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source.fetch(file).absolute())
    return folder


def load_processor(objective: Objective, *folders: Path) -> Any:
    """Tokenizer or image processor of the first folder that has one."""
    import transformers

    loaders = {
        "AutoModelForImageClassification": transformers.AutoImageProcessor,
        "CLIPModel": transformers.AutoProcessor,
    }
    loader = loaders.get(objective.auto_class, transformers.AutoTokenizer)
    errors = []
    for folder in folders:
        try:
            return loader.from_pretrained(folder)
        except (ValueError, OSError, KeyError, TypeError) as error:
            errors.append(" ".join(str(error).split())[:200])
    raise RequestError(
        f"neither the finetune nor the base has a tokenizer or processor that {loader.__name__} reads ({errors[0]}). "
        "Add its files to one of them."
    )
