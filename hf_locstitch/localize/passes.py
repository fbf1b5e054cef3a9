"""Forward and backward passes over a localization set; each gradient is consumed as it appears, and freed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from hf_locstitch.errors import RequestError, WorkError
from hf_locstitch.localize.grafted_model import GraftedModel, MaskedParameter, own_rows
from hf_locstitch.localize.kth_largest import pieces
from hf_locstitch.localize.updates import add_rounding
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.task import MicroBatch, Task

Advance = Callable[[int], object]


class State:
    """One number for every element of every parameter: tensors of their shapes, in memory or in mapped files.

    on: "device" means each parameter's own device.
    """

    def __init__(self, parameters: Mapping[str, MaskedParameter], dtype: str, on: str, folder: Path, name: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        for number, (key, masked) in enumerate(parameters.items()):
            shape = masked.shape
            narrow: torch.dtype = getattr(torch, dtype)
            kind = torch.float64 if masked.base.dtype == torch.float64 else narrow
            if on == "disk":
                file = folder / f"{name}.{number}"
                flat = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=kind)
                with suppress(PermissionError):  # Windows: it goes with its folder
                    file.unlink()  # the mapping keeps it alive; nothing is left behind, however the process ends
                self.tensors[key] = flat.zero_().view(shape)
            else:
                device = masked.device if on == "device" else torch.device("cpu")
                self.tensors[key] = torch.zeros(shape, dtype=kind, device=device)

    def __getitem__(self, masked: MaskedParameter) -> Tensor:
        return self.tensors[masked.name]

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Rounding:
    """A source of random bits on every device that asks for one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@contextmanager
def consuming(
    parameters: Iterable[MaskedParameter], consume: Callable[[MaskedParameter, Tensor], None]
) -> Iterator[None]:
    """While inside, `consume` gets the gradient of each parameter as soon as it is complete; then it is freed."""

    def hook(masked: MaskedParameter) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                consume(masked, own_rows(gradient))

        return take

    handles = [masked.parameter.register_post_accumulate_grad_hook(hook(masked)) for masked in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

    total: the same in all processes, before and after. Raises RequestError if the loss is not finite, WorkError if
    memory runs out.
    """
    alone = processes.count == 1 or grafted.sharded
    if not alone and not processes.first:
        total.clear()  # it counts in the first process's sum

    def consume(masked: MaskedParameter, gradient: Tensor) -> None:
        into = total[masked]
        add_rounding(into, gradient.to(into.device), rounding.on(into.device))

    loss = pass_over(grafted, task, batches, consume, processes, advance)
    for tensor in () if alone else total.tensors.values():
        for piece in pieces(tensor):
            processes.add_up(piece)
    return loss


def pass_over(
    grafted: GraftedModel,
    task: Task,
    batches: Sequence[MicroBatch],
    consume: Callable[[MaskedParameter, Tensor], None],
    processes: Processes,
    advance: Advance = lambda _: None,
) -> float:
    """Forward and backward passes over this process's share of the batches; returns the loss of all of them.

    consume: gets the gradient of a parameter for one micro-batch, on its device; where parameters are sharded, of its
    own rows, over all processes. Raises as add_gradients.
    """
    own = batches[processes.rank :: processes.count]
    if grafted.sharded:  # every process takes part in every pass, and gradients come averaged over the processes
        own = [MicroBatch(batch.examples, batch.factor * processes.count) for batch in own]
        idle = -(-len(batches) // processes.count) - len(own)
        own += [MicroBatch(batches[0].examples, 0.0)] * idle

    def work() -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        with consuming(grafted.parameters.values(), consume), memory_guard():
            for batch in own:
                part = task.loss(grafted.model, batch.examples) * batch.factor
                loss += part.detach().cpu()
                part.backward()
                advance(len(batch.examples))
        return loss

    loss = processes.together(work)
    processes.add_up(loss)
    if grafted.sharded:
        loss /= processes.count
    if not torch.isfinite(loss):
        raise RequestError(
            f"the loss on the localization set is {loss.item()}: the model overflows in its dtype or is damaged. "
            "Check the finetune and the data."
        )
    return loss.item()


@contextmanager
def memory_guard() -> Iterator[None]:
    """Say what to change when memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise WorkError(_too_large(error)) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise WorkError(_too_large(error)) from error


def _too_large(error: BaseException) -> str:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"out of memory in a pass over the localization set ({first_line[:160]}). In the recipe's "
        "localizer set micro_batch: 1, then checkpointing: true, then state_on: cpu or disk, or state_dtype: bfloat16; "
        "shorter examples (max_length of the data) help too."
    )
