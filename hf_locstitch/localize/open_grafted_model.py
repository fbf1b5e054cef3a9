"""From open checkpoints to what a pass needs: base and finetune, loaded by transformers, and the examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.localize.grafted_model import GraftedModel, keep_no_activations, make_grafted_model
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.runtime.progress import hide_all_library_bars
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.empty_model import attach_conversions
from hf_locstitch.tasks.loading import find_device, link_files, load_config, load_model, load_processor, main_dtype
from hf_locstitch.tasks.sets import OpenSet, read_rows
from hf_locstitch.tasks.task import Task


@hide_all_library_bars()
def open_grafted_model(
    config: WithData,
    name: str,
    base: CheckpointReader,
    finetuned: CheckpointReader,
    tensors: Sequence[TensorInfo],
    data: OpenSet,
    folder: Path,
) -> tuple[GraftedModel, Task]:
    """Both models loaded by transformers, and the examples prepared for them."""
    checkpoint = finetuned.checkpoint
    objective = data.asked.objective or suggest(checkpoint.config, checkpoint.label)
    folder_base = link_files(base.checkpoint, folder / f"{name}.base")
    folder_finetuned = link_files(checkpoint, folder / f"{name}.finetuned")
    model_config = load_config(folder_base if objective.base_config else folder_finetuned)
    localized = [info.name for info in tensors]
    model, _ = load_model(folder_finetuned, objective, model_config, main_dtype(map(checkpoint.info, localized)))
    if checkpoint.recut:  # what was recorded while it was loaded is how its own files lie
        attach_conversions(model, list(checkpoint.tensors))
    dtype = main_dtype(map(base.checkpoint.info, localized))
    original, absent = load_model(folder_base, objective, model_config, dtype)
    processor = load_processor(objective, folder_finetuned, folder_base)
    task = objective.prepare(read_rows(data), processor, original)

    def on_disk(tensor: str) -> torch.Tensor:
        info = checkpoint.info(tensor)
        return finetuned.flat(tensor, 0, info.numel).view(info.shape)

    device, where = find_device(config.device, float64=dtype == torch.float64), checkpoint.label
    grafted = make_grafted_model(model, original, absent, list(checkpoint.tensors), localized, on_disk, device, where,
                                 config.sharded)  # fmt: skip
    if config.checkpointing:
        keep_no_activations(grafted.model)
    return grafted, task
