"""The two ways to score with data: `saliency_scores` and `learn_mask`. Both leave one number an element in a State."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_locstitch.data.task import Task, micro_batches
from hf_locstitch.localize.gradients import AddedUp, Gradients, Passing, Work
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.passes import Advance, Rounding, State, add_gradients
from hf_locstitch.localize.ranking import Keys, Sizes, TopK, kth_largest, pieces, sortable
from hf_locstitch.localize.saliency import Saliency
from hf_locstitch.localize.subject import Place, Subject
from hf_locstitch.localize.updates import add_rounding, official_step, saliency, score_gradient, softened
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.processes import Processes


@dataclass(frozen=True)
class Room:
    """Where the work is done. folder: for mapped files."""

    folder: Path
    processes: Processes
    advance: Advance = lambda _: None


def saliency_scores(how: Saliency, subject: Subject, task: Task, room: Room) -> State:
    """|ḡ·τ| of every element, ḡ the gradient of the mean loss, averaged over the points `how.at`."""
    batches = list(micro_batches(task, how.together))
    total, rounding = _state(how, subject, room, "gradient"), Rounding(how.seed)
    for point in how.at:
        for place in subject.places.values():
            place.graft(point)
        add_gradients(subject, task, batches, total, rounding, room.processes, room.advance)
    for place in subject.places.values():
        for kept, gradient, task_vector in _aligned(place, total, total[place]):
            kept.copy_(saliency(gradient, task_vector) / len(how.at))
    return total


def learn_mask(how: Mask, subject: Subject, task: Task, room: Room) -> tuple[State, list[float]]:
    """S of every element, and the loss before every step. One step an epoch, from the gradient over the whole set.

    Where gradients come whole, each changes S as it appears and S is all that is kept; a relative step then takes two
    passes, since its length depends on all of them. Else they are added up first, in a second number an element.
    """
    official = how.preset == "official"
    batches = list(micro_batches(task, how.together, how.batch if official else None))
    rounding = Rounding(how.seed)
    scores = start_scores(how, subject, room)
    gradients: Gradients = Passing(work := Work(subject, task, batches, room.processes, room.advance))
    if not how.comes_whole(len(batches), room.processes.count):
        gradients = AddedUp(work, _state(how, subject, room, "gradient"), rounding)
    losses, lr = [], how.lr
    for _ in range(how.epochs):
        for place in subject.places.values():
            place.graft(torch.sigmoid(_wide(piece)).to(place.device) for piece in pieces(scores[place]))
        gradients.renew()
        if how.relative_lr:
            lr = how.lr / unit_step(how, subject, scores, gradients, room.processes)
        losses.append(gradients.feed(partial(_step, how, scores, lr, rounding)))
    return scores, losses


def start_scores(how: Mask, subject: Subject, room: Room) -> State:
    """S before the first step: how.start[1] for the largest |τ|, how.start[0] elsewhere."""
    scores = _state(how, subject, room, "scores")

    def magnitudes() -> Iterable[Keys]:
        return (sortable(piece) for place in subject.places.values() for piece in pieces(_magnitudes(place)))

    top = TopK(kth_largest(magnitudes, how.started(subject.size)))
    outside, inside = how.start
    for place in subject.places.values():
        kept = [torch.from_numpy(top.keep(sortable(piece))) for piece in pieces(_magnitudes(place))]
        chosen = torch.cat(kept).view(place.base.shape) if kept else torch.zeros(place.base.shape, dtype=torch.bool)
        scores[place].copy_(torch.where(place.part(chosen), inside, outside))
    return scores


def unit_step(how: Mask, subject: Subject, scores: State, gradients: Gradients, processes: Processes) -> float:
    """The k-th largest |∂loss/∂S|: divided by it, the k-th most changed element moves by one."""
    sizes = Sizes()

    def measure(place: Place, gradient: Tensor) -> None:
        for score, part, task_vector in _aligned(place, scores, gradient):
            sizes.add(score_gradient(part, task_vector, _wide(score), 0.0))

    gradients.feed(measure)
    # Where parameters are not shared out every process has measured all of them.
    unit = sizes.kth_largest(max(1, how.started(subject.size)), processes.sum if subject.sharded else None)
    return max(unit, torch.finfo(torch.float32).tiny)


def _step(how: Mask, scores: State, lr: float, rounding: Rounding, place: Place, gradient: Tensor) -> None:
    for score, part, task_vector in _aligned(place, scores, gradient):
        wide = _wide(score)
        if how.preset == "official":
            change = official_step(wide, part, task_vector, lr, how.penalty) - wide
        else:
            change = score_gradient(part, task_vector, wide, how.penalty).mul_(-lr)
            if how.relative_lr:
                change = softened(change, how.lr)
        add_rounding(score, change, rounding.on(score.device))


def _aligned(place: Place, state: State, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of the state's tensor, and of gradient and task vector in the latter's dtype, on the state's device."""
    device = state[place].device
    parts = zip(pieces(state[place]), pieces(gradient), place.task_vector_pieces(device), strict=True)
    for kept, part, task_vector in parts:
        yield kept, part.to(device, task_vector.dtype), task_vector


def _state(how: WithData, subject: Subject, room: Room, name: str) -> State:
    return State(subject.places, how.state_dtype, how.state_on, room.folder, f"{name}.{room.processes.rank}")


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _magnitudes(place: Place) -> Tensor:
    """|τ| of the whole parameter, on the CPU."""
    wide = torch.promote_types(place.base.dtype, torch.float32)
    return (place.finetuned.to(wide) - place.base.to(wide)).abs_()
