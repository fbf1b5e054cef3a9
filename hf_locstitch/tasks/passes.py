"""Forward and backward passes over examples; each gradient is consumed as it appears, and freed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hf_locstitch.checkpoints.tensors import pieces
from hf_locstitch.errors import RequestError, WorkError
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.loaded_model import LoadedModel, LoadedParameter, own_rows
from hf_locstitch.tasks.task import MicroBatch, Task

Advance = Callable[[int], object]
P = TypeVar("P", bound=LoadedParameter)


@dataclass(frozen=True)
class Words:
    """For messages. data: what is passed over ("the localization set"). cure: what to do when memory runs out."""

    data: str
    cure: str


class State:
    """One number for every element of every parameter: tensors of their shapes, in memory or in mapped files.

    on: "device" means each parameter's own device.
    """

    def __init__(self, parameters: Mapping[str, LoadedParameter], dtype: str, on: str, folder: Path, name: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        for number, (key, one) in enumerate(parameters.items()):
            shape = one.shape
            narrow: torch.dtype = getattr(torch, dtype)
            kind = torch.float64 if one.parameter.dtype == torch.float64 else narrow
            if on == "disk":
                file = folder / f"{name}.{number}"
                flat = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=kind)
                with suppress(PermissionError):  # Windows: it goes with its folder
                    file.unlink()  # the mapping keeps it alive; nothing is left behind, however the process ends
                self.tensors[key] = flat.zero_().view(shape)
            else:
                device = one.device if on == "device" else torch.device("cpu")
                self.tensors[key] = torch.zeros(shape, dtype=kind, device=device)

    def __getitem__(self, one: LoadedParameter) -> Tensor:
        return self.tensors[one.name]

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    def add_up(self, processes: Processes) -> None:
        """Replace the numbers by their sums over all processes."""
        for tensor in self.tensors.values():
            for piece in pieces(tensor):
                processes.add_up(piece)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@contextmanager
def consuming(parameters: Iterable[P], consume: Callable[[P, Tensor], None]) -> Iterator[None]:
    """While inside, `consume` gets the gradient of each parameter as soon as it is complete; then it is freed."""

    def hook(one: P) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                consume(one, own_rows(gradient))

        return take

    handles = [one.parameter.register_post_accumulate_grad_hook(hook(one)) for one in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pass_over(
    loaded: LoadedModel[P],
    task: Task,
    batches: Sequence[MicroBatch],
    consume: Callable[[P, Tensor], None],
    processes: Processes,
    words: Words,
    advance: Advance = lambda _: None,
) -> float:
    """Forward and backward passes over this process's share of the batches; returns the loss of all of them.

    consume: gets the gradient of a parameter for one micro-batch, on its device; where parameters are sharded, of its
    own rows, over all processes. Raises RequestError if the loss is not finite, WorkError if memory runs out.
    """
    own = batches[processes.rank :: processes.count]
    if loaded.sharded:  # every process takes part in every pass, and gradients come averaged over the processes
        own = [MicroBatch(batch.examples, batch.factor * processes.count) for batch in own]
        idle = -(-len(batches) // processes.count) - len(own)
        own += [MicroBatch(batches[0].examples, 0.0)] * idle

    def work() -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        with consuming(loaded.parameters.values(), consume), memory_guard(words):
            for batch in own:
                part = task.loss(loaded.model, batch.examples) * batch.factor
                loss += part.detach().cpu()
                part.backward()
                advance(len(batch.examples))
        return loss

    loss = processes.together(work)
    processes.add_up(loss)
    if loaded.sharded:
        loss /= processes.count
    if not torch.isfinite(loss):
        raise RequestError(
            f"the loss on {words.data} is {loss.item()}: the model overflows in its dtype or is damaged. "
            "Check the finetune and the data."
        )
    return loss.item()


@contextmanager
def memory_guard(words: Words) -> Iterator[None]:
    """Say what to change when memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise WorkError(_too_large(error, words)) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise WorkError(_too_large(error, words)) from error


def _too_large(error: BaseException, words: Words) -> str:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return f"out of memory in a pass over {words.data} ({first_line[:160]}). {words.cure}"
