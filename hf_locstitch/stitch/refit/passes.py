"""Forward passes that stop at every multiplication with a weight, so that many run through a model side by side.

A pass runs in its own thread, which is resumed for one step at a time. Everything between the linear layers (norms,
attention, activations, whatever the architecture does) is transformers' own code, and the order of the layers is the
order of its calls. The model holds no weights: a pass asks for each weight when it needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.runtime.chunks import keep_to_itself
from hf_locstitch.stitch.refit.lending import Lending
from hf_locstitch.stitch.refit.states import States
from hf_locstitch.stitch.refit.stops import ExpertsStop, Key, LinearStop
from hf_locstitch.stitch.refit.weights import Weights


class _Abandoned(BaseException):
    """Ends the thread of an abandoned pass."""


class Pass:
    """One forward pass. weights: of its model. work: runs it. stops: parameters at which it waits for `go_on`.
    sums: keys of linear layers at which it waits only when their output is added to something.

    states: where it offloads its hidden states while it waits; None: it keeps them. in_blocks: weights that each
    transformer block runs with first, for the stops in it; its result is that of `weights`, with which it then runs
    again without a stop. block: the name of the one that runs, if there are such weights.

    inside: which rows of a layer's input are not padding, bool [examples, tokens], possibly of several shapes.
    added, used: keys of layers it stopped at whose output was added to another tensor, or used in any other way.
    hidden: the last hidden states before any head, [..., width], where the model has such.
    """

    _here = threading.local()

    def __init__(
        self,
        weights: Weights,
        work: Callable[[], Any],
        stops: frozenset[str],
        sums: frozenset[Key] = frozenset(),
        states: States | None = None,
        in_blocks: Weights | None = None,
    ) -> None:
        self.weights, self.stops, self.sums, self.states = weights, stops, sums, states
        self.in_blocks = in_blocks
        self.block: str | None = None
        self.inside: list[Tensor] = []
        self.added: set[Key] = set()
        self.used: set[Key] = set()
        self.stop: LinearStop | ExpertsStop | None = None
        self.result: Any = None
        self.hidden: Tensor | None = None
        self._work, self._error = work, None
        self._answer: Any = None
        self._abandoned = False
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Run to the first stop, or to the end."""
        self._thread.start()
        self._await()

    def go_on(self, answer: Any = None) -> None:
        """Answer the current stop and run to the next, or to the end."""
        self.take_back()
        self._answer, self.stop = answer, None
        self._go.release()
        self._await()

    def multiply(self, weight: Tensor, bias: Tensor | None) -> None:
        """Continue with the output of a layer with this weight [outputs, inputs] and bias."""
        self.take_back()
        self.go_on(F.linear(linear_stop(self).x, weight, bias))

    def end(self) -> None:
        """Abandon the pass."""
        if self._thread.is_alive():
            self._abandoned, self.stop = True, None
            self._go.release()
            self._thread.join()

    def take_back(self) -> None:
        """Bring its hidden states back to the device, as `go_on` does anyway."""
        if self.states is not None:
            self.states.take_back()

    def at_hand(self) -> AbstractContextManager[None]:
        """While inside, the tensors of its stop may be read, and `rows` asked for; they may always be told apart."""
        held = [value for value in vars(self.stop).values() if isinstance(value, Tensor)] if self.stop else []
        return self.states.at_hand([*held, *self.inside]) if self.states is not None else nullcontext()

    def rows(self, x: Tensor) -> Tensor:
        """Numbers of the rows of a linear's input [..., inputs], flattened, that are no padding. Returns int64."""
        kept = torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        for inside in self.inside:
            if x.shape[:-1] in (inside.shape, (inside.numel(),)):
                kept &= inside.reshape(-1)
        return kept.nonzero().flatten()

    def ask(self, stop: LinearStop | ExpertsStop) -> Any:
        """Called by the pass's own thread: wait for the answer."""
        self.stop = stop
        self._arrived.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        answer, self._answer = self._answer, None
        if self.states is not None:
            self.states.note(answer, ())
        return answer

    @contextmanager
    def straight(self) -> Iterator[None]:
        """Inside, the pass does not stop."""
        stops, self.stops = self.stops, frozenset()
        try:
            yield
        finally:
            self.stops = stops

    @contextmanager
    def inside_block(self, name: str) -> Iterator[None]:
        """Inside, the pass runs with the weights of blocks."""
        outside = self.weights
        assert self.in_blocks is not None
        self.weights, self.block = self.in_blocks, name
        try:
            yield
        finally:
            self.weights, self.block = outside, None

    @classmethod
    def current(cls) -> Pass | None:
        """The pass that runs in this thread."""
        return getattr(cls._here, "value", None)

    def _await(self) -> None:
        self._arrived.acquire()
        if self._error is not None:
            raise self._error
        if self.states is not None and self.stop is not None:
            self.states.put_away()

    def _run(self) -> None:
        Pass._here.value = self
        keep_to_itself()
        try:
            with torch.no_grad(), Lending(self):
                self.result = self._work()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.stop = None
            self._arrived.release()


def linear_stop(one: Pass) -> LinearStop:
    assert isinstance(one.stop, LinearStop)
    return one.stop
