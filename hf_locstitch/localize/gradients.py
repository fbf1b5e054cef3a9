"""The gradient of a set's loss, parameter by parameter: consumed as it appears where possible, else accumulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_locstitch.localize.grafted_model import GraftedModel, MaskedParameter
from hf_locstitch.localize.updates import add_rounding
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.passes import Advance, State, Words, pass_over
from hf_locstitch.tasks.task import MicroBatch, Task

Use = Callable[[MaskedParameter, Tensor], None]
LOCALIZING = Words(
    "the localization set",
    "In the recipe's localizer set micro_batch: 1, then checkpointing: true, then state_on: cpu or disk, or "
    "state_dtype: bfloat16; shorter examples (max_length of the data) help too.",
)


class Rounding:
    """A source of random bits on every device that asks for one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def add_gradients(
    grafted: GraftedModel,
    task: Task,
    batches: Sequence[MicroBatch],
    total: State,
    rounding: Rounding,
    processes: Processes,
    advance: Advance = lambda _: None,
) -> float:
    """Add the gradient of the batches' loss to `total`, and return the loss. Every process takes its share.

    total: the same in all processes, before and after. Raises as pass_over.
    """
    alone = processes.count == 1 or grafted.sharded
    if not alone and not processes.first:
        total.clear()  # it counts in the first process's sum

    def consume(masked: MaskedParameter, gradient: Tensor) -> None:
        into = total[masked]
        add_rounding(into, gradient.to(into.device), rounding.on(into.device))

    loss = pass_over(grafted, task, batches, consume, processes, LOCALIZING, advance)
    if not alone:
        total.add_up(processes)
    return loss


@dataclass(frozen=True)
class Work:
    """What a pass needs. batches: micro-batches of the whole set, identical in all processes."""

    grafted: GraftedModel
    task: Task
    batches: Sequence[MicroBatch]
    processes: Processes
    advance: Advance = lambda _: None


class Gradients(Protocol):
    """Gradients of the loss at the current weights, over all micro-batches and processes."""

    def renew(self) -> None:
        """Called after the weights have changed."""
        ...

    def feed(self, use: Use) -> float:
        """Call `use` once for every parameter, with its gradient [*shape]; return the loss. Raises as pass_over."""
        ...


@dataclass
class Passing(Gradients):
    """Not stored: every feed is a pass. For gradients that are complete after one micro-batch."""

    work: Work

    def renew(self) -> None:
        pass

    def feed(self, use: Use) -> float:
        work, left = self.work, dict(self.work.grafted.parameters)

        def take(masked: MaskedParameter, gradient: Tensor) -> None:
            del left[masked.name]
            use(masked, gradient)

        loss = pass_over(work.grafted, work.task, work.batches, take, work.processes, LOCALIZING, work.advance)
        for masked in left.values():  # unused by all examples, such as an expert that no token was routed to
            use(masked, torch.zeros((), device=masked.device).expand(masked.shape))
        return loss


@dataclass
class AddedUp(Gradients):
    """Stored as one number per element, by one pass over all micro-batches; feeds cost nothing."""

    work: Work
    total: State
    rounding: Rounding
    loss: float = 0.0

    def renew(self) -> None:
        work = self.work
        self.total.clear()
        self.loss = add_gradients(
            work.grafted, work.task, work.batches, self.total, self.rounding, work.processes, work.advance
        )

    def feed(self, use: Use) -> float:
        for masked in self.work.grafted.parameters.values():
            use(masked, self.total[masked])
        return self.loss
