"""From a finetune and its localization set to a file of scores that the selection reads."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import TORCH_DTYPE, CheckpointReader
from hf_locstitch.checkpoints.side_files import side_files
from hf_locstitch.data.objectives import suggest
from hf_locstitch.data.sets import OpenSet, read_rows
from hf_locstitch.data.task import Objective, Task
from hf_locstitch.errors import NonFiniteError, RequestError
from hf_locstitch.localize.learn import Room, learn_mask, saliency_scores
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.passes import State
from hf_locstitch.localize.ranking import Keys, kth_largest, pieces, sortable
from hf_locstitch.localize.saliency import Saliency
from hf_locstitch.localize.score_file import LARGEST, ScoreFile, write_scores
from hf_locstitch.localize.subject import OnDisk, Place, Subject, keep_no_activations, load_config, load_model, no_bars
from hf_locstitch.localize.subject import make_subject as set_up
from hf_locstitch.localize.with_data import WithData

Pieces = Iterator[tuple[str, int, torch.Tensor]]


def score(
    how: Mask | Saliency,
    name: str,
    base: CheckpointReader,
    finetuned: CheckpointReader,
    tensors: Sequence[TensorInfo],
    data: OpenSet,
    room: Room,
) -> ScoreFile:
    """The scores of one finetune, from an earlier process if it left them. Every process calls it.

    name: of the finetune. tensors: the localized ones, as the base holds them. Raises RequestError or WorkError.
    """
    path = room.folder / f"{name}.scores"
    if not any(room.processes.gather(path.exists())):
        subject, task = room.processes.together(
            lambda: open_subject(how, f"{name}.{room.processes.rank}", base, finetuned, tensors, data, room.folder)
        )
        state, losses, ones = _scores(how, subject, task, room)
        if isinstance(how, Mask):
            found = ranked(subject, state, finetuned, base, _kept(how, tensors, ones))
        else:
            found = _pieces(subject, state)
        infos = list(tensors)
        found = _finite(found, name)
        if how.sharded:  # all gather what the first one writes
            room.processes.together(
                lambda: _write(path, infos, found, ones, losses) if room.processes.first else deque(found, maxlen=0)
            )
        else:
            room.processes.on_first(lambda: _write(path, infos, found, ones, losses))
    return ScoreFile(path)


def _write(path: Path, infos: Sequence[TensorInfo], found: Pieces, ones: int | None, losses: Sequence[float]) -> None:
    write_scores(path, infos, found, ones, losses)


def _scores(how: Mask | Saliency, subject: Subject, task: Task, room: Room) -> tuple[State, list[float], int | None]:
    """The state that ranks, the losses on the way, and the number of ones where the state decides it."""
    if isinstance(how, Saliency):
        return saliency_scores(how, subject, task, room), [], None
    state, losses = learn_mask(how, subject, task, room)
    if how.density is not None:
        return state, losses, None
    on_disk = (piece for _, tensor in subject.to_disk(state.__getitem__) for piece in pieces(tensor))
    return state, losses, sum(int((piece > 0).sum()) for piece in on_disk)


def _kept(how: Mask, tensors: Sequence[TensorInfo], ones: int | None) -> int:
    return how.kept([info.numel for info in tensors]) if ones is None else ones


def _pieces(subject: Subject, state: State) -> Pieces:
    for name, tensor in subject.to_disk(state.__getitem__):
        first = 0
        for piece in pieces(tensor):
            yield name, first, piece.detach().float().cpu()
            first += len(piece)


def ranked(subject: Subject, state: State, finetuned: CheckpointReader, base: CheckpointReader, k: int) -> Pieces:
    """Scores whose k largest are those of the state, ties by |τ|, then evenly.

    What is above the k-th largest of the state gets the largest number; what is equal to it gets |τ|'s bits and one
    more, what is below gets 0. So one float32 ranks by two keys, exactly.
    """

    def keys() -> Iterator[Keys]:
        return (sortable(piece) for _, _, piece in _pieces(subject, state))

    threshold = kth_largest(keys, k)
    for name, first, piece in _pieces(subject, state):
        key = sortable(piece)
        theirs = finetuned.flat(name, first, len(piece)).float()
        magnitude = (theirs - base.flat(name, first, len(piece)).float()).abs().numpy().view(np.int32)
        bits = np.where(key > threshold.bits, LARGEST, np.minimum(magnitude, LARGEST - 2) + 1)
        bits = np.where(key < threshold.bits, 0, bits).astype(np.int32)
        yield name, first, torch.from_numpy(bits.view(np.float32))


def _finite(found: Pieces, name: str) -> Pieces:
    for tensor, first, piece in found:
        if not torch.isfinite(piece).all():
            raise NonFiniteError(
                f"the scores of {name} hold NaN or infinity in {tensor}: a weight or a gradient there does. "
                "Leave the tensor out with --exclude, or check the checkpoints."
            )
        yield tensor, first, piece


@no_bars()
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
    folders = {role: link_files(c, folder / f"{name}.{role}") for role, c in _roles(base, finetuned).items()}
    config = load_config(folders["base" if objective.base_config else "finetuned"])
    dtypes = {role: _dtype(c.checkpoint, tensors) for role, c in (("base", base), ("finetuned", finetuned))}
    model, _ = load_model(folders["finetuned"], objective, config, dtypes["finetuned"])
    original, absent = load_model(folders["base"], objective, config, dtypes["base"])
    processor = load_processor(objective, folders["finetuned"], folders["base"])
    task = objective.prepare(read_rows(data), processor, original)
    shapes = {info.name: info.shape for info in checkpoint_infos(checkpoint)}
    on_disk: OnDisk = lambda tensor: finetuned.flat(tensor, 0, _numel(shapes[tensor])).view(shapes[tensor])  # noqa: E731
    localized = [info.name for info in tensors]
    device = find_device(how)
    subject = set_up(model, original, absent, list(shapes), localized, on_disk, device, checkpoint.label, how.sharded)
    if how.checkpointing:
        keep_no_activations(subject.model)
    return subject, task


def _roles(base: CheckpointReader, finetuned: CheckpointReader) -> Mapping[str, Checkpoint]:
    return {"base": base.checkpoint, "finetuned": finetuned.checkpoint}


def checkpoint_infos(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [info for _, info in checkpoint.tensors.values()]


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _dtype(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> torch.dtype:
    """That of most localized elements on disk."""
    counts: Counter[str] = Counter()
    for info in tensors:
        counts[checkpoint.info(info.name).dtype] += info.numel
    return TORCH_DTYPE[counts.most_common(1)[0][0]]


def find_device(how: WithData) -> torch.device:
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


__all__ = ["Place", "ScoreFile", "score"]
