"""The two ways to score with data: `saliency_scores` and `learn_mask`. Both leave one number per element in a State."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hf_locstitch.checkpoints.tensors import pieces
from hf_locstitch.localize.gradients import AddedUp, Gradients, Passing, Rounding, Work, add_gradients
from hf_locstitch.localize.grafted_model import GraftedModel, MaskedParameter
from hf_locstitch.localize.kth_largest import Keys, Sizes, TopK, kth_largest, sortable
from hf_locstitch.localize.updates import add_rounding, official_step, saliency, score_gradient, softened
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.passes import Advance, State
from hf_locstitch.tasks.task import Task, micro_batches


class MachineUse(Protocol):
    """As of WithData."""

    @property
    def state_dtype(self) -> str: ...

    @property
    def state_on(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def together(self) -> int: ...


class SaliencySettings(MachineUse, Protocol):
    """As of localizers/saliency.py."""

    @property
    def at(self) -> tuple[float, ...]: ...


class MaskSettings(MachineUse, Protocol):
    """As of localizers/mask.py."""

    @property
    def official(self) -> bool: ...

    @property
    def batch(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def relative_lr(self) -> bool: ...

    @property
    def penalty(self) -> float: ...

    @property
    def start(self) -> tuple[float, float]: ...

    def started(self, n: int) -> int: ...

    def comes_whole(self, batches: int, processes: int) -> bool: ...


@dataclass(frozen=True)
class Room:
    """Where the work runs. folder: for mapped files."""

    folder: Path
    processes: Processes
    advance: Advance = lambda _: None


@dataclass(frozen=True)
class Learned:
    """state: what ranks the elements. losses: during learning. ones: how many the mask keeps, if the state decides.

    ranks: whether only the order of the numbers counts, so that ties are broken by |τ|; else they are non-negative
    scores.
    """

    state: State
    losses: list[float]
    ones: int | None = None
    ranks: bool = False


def count_positive(grafted: GraftedModel, state: State) -> int:
    """How many numbers of the state are above 0, over all processes."""
    return sum(int((tensor > 0).sum()) for _, tensor in grafted.to_disk(state.__getitem__))


def saliency_scores(config: SaliencySettings, grafted: GraftedModel, task: Task, room: Room) -> State:
    """|ḡ·τ| of every element, ḡ the gradient of the mean loss, averaged over the points `config.at`."""
    batches = list(micro_batches(task, config.together))
    total, rounding = _state(config, grafted, room, "gradient"), Rounding(config.seed)
    for point in config.at:
        for masked in grafted.parameters.values():
            masked.graft(point)
        add_gradients(grafted, task, batches, total, rounding, room.processes, room.advance)
    for masked in grafted.parameters.values():
        for kept, gradient, task_vector in _aligned(masked, total, total[masked]):
            kept.copy_(saliency(gradient, task_vector) / len(config.at))
    return total


def learn_mask(config: MaskSettings, grafted: GraftedModel, task: Task, room: Room) -> tuple[State, list[float]]:
    """S of every element, and the loss before every step. One step per epoch, from the gradient over the whole set.

    Where one micro-batch gives the complete gradient, S is updated as gradients appear, and only S is stored; a
    relative step then takes two passes, since its length depends on all of them. Else gradients are accumulated first,
    in a second number per element.
    """
    batches = list(micro_batches(task, config.together, config.batch if config.official else None))
    rounding = Rounding(config.seed)
    scores = start_scores(config, grafted, room)
    gradients: Gradients = Passing(work := Work(grafted, task, batches, room.processes, room.advance))
    if not config.comes_whole(len(batches), room.processes.count):
        gradients = AddedUp(work, _state(config, grafted, room, "gradient"), rounding)
    losses, lr = [], config.lr
    for _ in range(config.epochs):
        for masked in grafted.parameters.values():
            masked.graft(torch.sigmoid(_wide(piece)).to(masked.device) for piece in pieces(scores[masked]))
        gradients.renew()
        if config.relative_lr:
            lr = config.lr / unit_step(config, grafted, scores, gradients, room.processes)
        losses.append(gradients.feed(partial(_step, config, scores, lr, rounding)))
    return scores, losses


def start_scores(config: MaskSettings, grafted: GraftedModel, room: Room) -> State:
    """S before the first step: config.start[1] for the largest |τ|, config.start[0] elsewhere."""
    scores = _state(config, grafted, room, "scores")

    def magnitudes() -> Iterable[Keys]:
        masked = grafted.parameters.values()
        return (sortable(piece) for one in masked for piece in pieces(_magnitudes(one)))

    top = TopK(kth_largest(magnitudes, config.started(grafted.size)))
    outside, inside = config.start
    for masked in grafted.parameters.values():
        kept = [torch.from_numpy(top.keep(sortable(piece))) for piece in pieces(_magnitudes(masked))]
        chosen = torch.cat(kept).view(masked.base.shape) if kept else torch.zeros(masked.base.shape, dtype=torch.bool)
        scores[masked].copy_(torch.where(masked.part(chosen), inside, outside))
    return scores


def unit_step(
    config: MaskSettings, grafted: GraftedModel, scores: State, gradients: Gradients, processes: Processes
) -> float:
    """The k-th largest |∂loss/∂S|: with gradients divided by it, the k-th most changed element changes by one."""
    sizes = Sizes()

    def measure(masked: MaskedParameter, gradient: Tensor) -> None:
        for score, part, task_vector in _aligned(masked, scores, gradient):
            sizes.add(score_gradient(part, task_vector, _wide(score), 0.0))

    gradients.feed(measure)
    # Unless parameters are sharded, every process has measured all of them.
    unit = sizes.kth_largest(max(1, config.started(grafted.size)), processes.sum if grafted.sharded else None)
    return max(unit, torch.finfo(torch.float32).tiny)


def _step(
    config: MaskSettings, scores: State, lr: float, rounding: Rounding, masked: MaskedParameter, gradient: Tensor
) -> None:
    for score, part, task_vector in _aligned(masked, scores, gradient):
        wide = _wide(score)
        if config.official:
            change = official_step(wide, part, task_vector, lr, config.penalty) - wide
        else:
            change = score_gradient(part, task_vector, wide, config.penalty).mul_(-lr)
            if config.relative_lr:
                change = softened(change, config.lr)
        add_rounding(score, change, rounding.on(score.device))


def _aligned(masked: MaskedParameter, state: State, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of the state's tensor, and of gradient and task vector in the latter's dtype, on the state's device."""
    device = state[masked].device
    parts = zip(pieces(state[masked]), pieces(gradient), masked.task_vector_pieces(device), strict=True)
    for kept, part, task_vector in parts:
        yield kept, part.to(device, task_vector.dtype), task_vector


def _state(config: MachineUse, grafted: GraftedModel, room: Room, name: str) -> State:
    return State(grafted.parameters, config.state_dtype, config.state_on, room.folder, f"{name}.{room.processes.rank}")


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _magnitudes(masked: MaskedParameter) -> Tensor:
    """|τ| of the whole parameter, on the CPU."""
    wide = torch.promote_types(masked.base.dtype, torch.float32)
    return (masked.finetuned.to(wide) - masked.base.to(wide)).abs_()
