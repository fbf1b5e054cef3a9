"""The two ways to score with data: `saliency_scores` and `learn_mask`. Both leave one number an element in a State."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_locstitch.data.task import Task, micro_batches
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.passes import Advance, Rounding, State, add_gradients
from hf_locstitch.localize.ranking import Keys, TopK, kth_largest, pieces, sortable
from hf_locstitch.localize.saliency import Saliency
from hf_locstitch.localize.subject import Place, Subject, is_shared_out
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
    batches = list(micro_batches(task, how.micro_batch))
    total, rounding = _state(how, subject, room, "gradient"), Rounding(how.seed)
    for point in how.at:
        for place in subject.places.values():
            place.graft(point)
        add_gradients(subject, task, batches, total, rounding, room.processes, room.advance)
    for place in subject.places.values():
        for gradient, task_vector in zip(pieces(total[place]), _task_vector_pieces(place, total), strict=True):
            gradient.copy_(saliency(gradient.to(task_vector.dtype), task_vector) / len(how.at))
    return total


def learn_mask(how: Mask, subject: Subject, task: Task, room: Room) -> tuple[State, list[float]]:
    """S of every element, and the loss before every step. One step an epoch, from the gradient over the whole set."""
    official = how.preset == "official"
    batches = list(micro_batches(task, how.micro_batch, how.batch if official else None))
    rounding = Rounding(how.seed)
    scores = start_scores(how, subject, room)
    gradient = _state(how, subject, room, "gradient")
    losses, lr = [], how.lr
    for _ in range(how.epochs):
        gradient.clear()
        for place in subject.places.values():
            place.graft(torch.sigmoid(_wide(scores[place])).to(place.device))
        losses.append(add_gradients(subject, task, batches, gradient, rounding, room.processes, room.advance))
        if how.relative_lr:
            lr = how.lr / unit_step(how, subject, scores, gradient, room.processes)
        for place in subject.places.values():
            _step(how, place, scores, gradient, lr, rounding)
    return scores, losses


def start_scores(how: Mask, subject: Subject, room: Room) -> State:
    """S before the first step: how.start[1] for the largest |τ|, how.start[0] elsewhere."""
    scores = _state(how, subject, room, "scores")
    n = sum(place.base.numel() for place in subject.places.values())

    def magnitudes() -> Iterable[Keys]:
        return (sortable(piece) for place in subject.places.values() for piece in pieces(_magnitudes(place)))

    top = TopK(kth_largest(magnitudes, how.started(n)))
    outside, inside = how.start
    for place in subject.places.values():
        kept = [torch.from_numpy(top.keep(sortable(piece))) for piece in pieces(_magnitudes(place))]
        chosen = torch.cat(kept).view(place.base.shape) if kept else torch.zeros(place.base.shape, dtype=torch.bool)
        scores[place].copy_(torch.where(place.part(chosen), inside, outside))
    return scores


def unit_step(how: Mask, subject: Subject, scores: State, gradient: State, processes: Processes) -> float:
    """The k-th largest |∂loss/∂S|: divided by it, the k-th most changed element moves by one."""

    def changes() -> Iterable[Keys]:
        for place in subject.places.values():
            parts = zip(pieces(scores[place]), pieces(gradient[place]), _task_vector_pieces(place, scores), strict=True)
            for score, part, task_vector in parts:
                yield sortable(score_gradient(part.to(task_vector.dtype), task_vector, _wide(score), 0.0).abs())

    n = sum(place.base.numel() for place in subject.places.values())
    sharded = any(is_shared_out(place.parameter) for place in subject.places.values())
    add_up = processes.sum if sharded else (lambda counts: counts)
    threshold = kth_largest(changes, max(1, how.started(n)), add_up)
    bits = torch.tensor(threshold.bits - (1 << 31), dtype=torch.int32)  # as `sortable` has them, of a number ≥ 0
    return max(bits.view(torch.float32).item(), torch.finfo(torch.float32).tiny)


def _step(how: Mask, place: Place, scores: State, gradient: State, lr: float, rounding: Rounding) -> None:
    parts = zip(pieces(scores[place]), pieces(gradient[place]), _task_vector_pieces(place, scores), strict=True)
    for score, part, task_vector in parts:
        wide, part = _wide(score), part.to(task_vector.dtype)
        if how.preset == "official":
            change = official_step(wide, part, task_vector, lr, how.penalty) - wide
        else:
            change = score_gradient(part, task_vector, wide, how.penalty).mul_(-lr)
            if how.relative_lr:
                change = softened(change, how.lr)
        add_rounding(score, change, rounding.on(score.device))


def _state(how: WithData, subject: Subject, room: Room, name: str) -> State:
    return State(subject.places, how.state_dtype, how.state_on, room.folder, f"{name}.{room.processes.rank}")


def _wide(scores: torch.Tensor) -> torch.Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _magnitudes(place: Place) -> torch.Tensor:
    """|τ| of the whole parameter, on the CPU."""
    wide = torch.promote_types(place.base.dtype, torch.float32)
    return (place.finetuned.to(wide) - place.base.to(wide)).abs_()


def _task_vector_pieces(place: Place, state: State) -> Sequence[torch.Tensor]:
    """In step with the pieces of a state's tensor, on its device."""
    return list(pieces(place.task_vector(state[place].device)))
