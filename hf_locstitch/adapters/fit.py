"""Laying an adapter over a base, judging by headers: what it changes, and whether PEFT can merge it."""

from __future__ import annotations

import torch

from hf_locstitch.adapters.adapted_model import AdaptedModel, Skeleton, skeleton_of
from hf_locstitch.adapters.settings import model_classes, not_mergeable, peft_config, short
from hf_locstitch.checkpoints.adapter import AdapterCheckpoint
from hf_locstitch.checkpoints.checkpoint import CONFIG, Checkpoint
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.errors import CheckpointError, RequestError
from hf_locstitch.runtime.human import some
from hf_locstitch.tasks.custom_code import refuse_custom_code


def lay_over(adapter: AdapterCheckpoint, base: Checkpoint) -> AdapterCheckpoint:
    """The adapter with the base's tensors. Reads no weight of either.

    Raises CheckpointError if it does not fit the base, or is of a kind that PEFT cannot merge.
    """
    config = peft_config(adapter)
    if not base.config:
        raise CheckpointError(
            f"{base.label} has no {CONFIG}, so the model that the adapter {adapter.label} belongs to cannot be built. "
            "Use a base with its config."
        )
    refuse_custom_code(base, f"the adapter {adapter.label}")
    shard = adapter.shards[0]
    weights = {
        info.name: torch.zeros((), dtype=TORCH_DTYPE.get(info.dtype, torch.float32)).expand(info.shape)
        for info in shard.header.tensors
    }
    failures: list[RequestError] = []
    for auto_class in model_classes(adapter, base.config):
        try:
            model = AdaptedModel(adapter, _skeleton(base, auto_class), config, weights, None)
        except RequestError as error:
            failures.append(error)
            continue
        _check_mergeable(adapter, model)
        return adapter.laid_over(base, auto_class, [layer.disk for layer in model.layers], model.left)
    raise failures[0]


def _skeleton(base: Checkpoint, auto_class: str) -> Skeleton:
    try:
        return skeleton_of(base, auto_class)
    except (AttributeError, TypeError) as error:  # a class of another architecture
        raise CheckpointError(f"{auto_class} cannot build the model of {base.label} ({short(error)}).") from error


def _check_mergeable(adapter: AdapterCheckpoint, model: AdaptedModel) -> None:
    """Try the smallest module of each type that PEFT put in. Raises CheckpointError."""
    if not model.layers:
        changed = some(model.left) if model.left else "nothing"
        raise CheckpointError(f"{adapter.label} changes no tensor of its base: it holds {changed}. Check the name.")
    sizes = {path: model.sizes(path) for layer in model.layers for path in layer.modules}
    smallest: dict[tuple[type, tuple[str, ...]], str] = {}
    for path in sorted(sizes, key=lambda path: sum(shape.numel() for shape in sizes[path].values())):
        locals_ = tuple(name.rpartition(".")[2] for name in sizes[path])
        smallest.setdefault((type(model.modules[path]), locals_), path)
    for path in smallest.values():
        try:
            model.merge(path, {name: torch.rand(shape) for name, shape in sizes[path].items()})
        except Exception as error:  # of whatever type a kind of adapter raises
            raise not_mergeable(adapter, f"{path}: {short(error)}") from error
