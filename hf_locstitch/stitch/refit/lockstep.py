"""Passes of all tasks and processes, side by side from stop to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.chunks import for_each
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.refit.passes import Experts, Key, Linear, Pass


@dataclass(frozen=True)
class LockstepStop:
    """Where the passes of all processes are: in the parts of one task's model. A process may have no pass there."""

    task: int
    place: Linear | Experts


@dataclass
class Pair:
    """The merged model and the finetuned one on the same inputs of a task (its number). fitted: else held out.

    score: how far apart their outputs are, or how wrong the merged model's, summed, and over how many rows. number: of
    the batch in its task. examples: its inputs.
    """

    task: int
    fitted: bool
    merged: Pass
    finetuned: Pass
    score: tuple[float, int] | None = None
    number: int = field(default=0, kw_only=True)
    examples: Sequence[Any] = ()

    @property
    def passes(self) -> tuple[Pass, Pass]:
        return self.merged, self.finetuned

    @property
    def stops(self) -> tuple[Any, Any]:
        """Where both are."""
        return self.merged.stop, self.finetuned.stop


class SideBySide(Protocol):
    """What is led together: a Pair, or a pass alone. task: whose model it is, by number."""

    @property
    def task(self) -> int: ...

    @property
    def passes(self) -> tuple[Pass, ...]: ...

    @property
    def stops(self) -> tuple[Any, ...]: ...


Led = TypeVar("Led", bound=SideBySide)


def lockstep(
    pairs: Sequence[Led],
    visit: Callable[[Sequence[Led], LockstepStop], Callable[[], object]],
    workers: int,
    processes: Processes,
) -> None:
    """Take all passes of all processes from stop to stop until each has ended. pairs: of this process, if any.

    visit: is called in every process wherever they meet, also where none of its own pairs is; what it returns makes
    those go on, and talks to no other process, so that an error in it can be told to all.
    Raises RequestError if they are not at the same stop at the same time.
    """
    passes = [one for pair in pairs for one in pair.passes]

    def where(_: object) -> dict[Key | None, LockstepStop | None]:
        return _places(pairs)

    go_on: Callable[[], object] = lambda: for_each(Pass.start, passes, workers)  # noqa: E731
    try:
        while True:
            _, told = processes.share(go_on, where)
            del go_on  # with all that it holds
            met = {key: meeting for found in reversed(told) for key, meeting in found.items()}
            if not met:
                return
            if len(met) > 1:
                one, other = list(dict.fromkeys(key for found in told for key in found))[:2]
                raise RequestError(
                    "the order in which the model calls its linears depends on the input: one pass has come to "
                    f"{_said(one)}, another to {_said(other)}. Such a model cannot be refitted as a whole: leave these "
                    "tensors out with --exclude, or use --stitch mean."
                )
            (meeting,) = met.values()
            assert meeting is not None
            go_on = visit([pair for pair in pairs if any(pair.stops)], meeting)
    finally:
        for one in passes:
            one.end()


def _places(pairs: Sequence[SideBySide]) -> dict[Key | None, LockstepStop | None]:
    """Where pairs are of which not both passes have ended, by their keys; one place if all is well."""
    found: dict[Key | None, LockstepStop | None] = {}
    for pair in pairs:
        if any(pair.stops):
            for stop in pair.stops:
                found.setdefault(stop and stop.key, stop and LockstepStop(pair.task, stop.place))
    return found


def _said(key: Key | None) -> str:
    """The first name on disk in a key."""
    while isinstance(key, tuple) and key:
        key = key[0]
    return "the end" if key is None else str(key)
