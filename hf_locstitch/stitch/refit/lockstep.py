"""Running the passes of all tasks and processes side by side, from stop to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.chunks import for_each
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.stops import Experts, Key, Linear


@dataclass(frozen=True)
class LockstepStop:
    """Where the passes of all processes wait, as parts of one task's model. A process may have no pass there."""

    task: int
    place: Linear | Experts


@dataclass
class Pair:
    """Passes of the merged and the finetuned model on the same inputs of a task (its index). fitted: else held out.

    score: see agreement.judge. number: index of the batch in its task. examples: its inputs.
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
        """Where both wait."""
        return self.merged.stop, self.finetuned.stop


class SideBySide(Protocol):
    """What lockstep runs: a Pair, or a single pass. task: the index of the task whose model it is."""

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
    """Run all passes of all processes from stop to stop until all have ended. pairs: of this process, if any.

    visit: called in every process at every stop, even where none of its own pairs waits. It returns a function that
    continues the pairs, without communication, so that its errors can be reported to all processes.
    Raises RequestError if they are not at the same stop at the same time.
    """
    passes = [one for pair in pairs for one in pair.passes]

    def where(_: object) -> dict[Key | None, LockstepStop | None]:
        return _stops_of(pairs)

    go_on: Callable[[], object] = lambda: for_each(Pass.start, passes, workers)  # noqa: E731
    try:
        while True:
            _, told = processes.share(go_on, where)
            del go_on  # and all that it holds
            met = {key: stop for found in reversed(told) for key, stop in found.items()}
            if not met:
                return
            if len(met) > 1:
                one, other = list(dict.fromkeys(key for found in told for key in found))[:2]
                raise RequestError(
                    "the order in which the model calls its linear layers depends on the input: one pass has reached "
                    f"{_name_of(one)}, another {_name_of(other)}. Such a model cannot be refitted as a whole: exclude "
                    "these tensors with --exclude, or use --stitch mean."
                )
            (stop,) = met.values()
            assert stop is not None
            go_on = visit([pair for pair in pairs if any(pair.stops)], stop)
    finally:
        for one in passes:
            one.end()


def _stops_of(pairs: Sequence[SideBySide]) -> dict[Key | None, LockstepStop | None]:
    """The stops of unfinished pairs, by key; a single one unless the passes diverge."""
    found: dict[Key | None, LockstepStop | None] = {}
    for pair in pairs:
        if any(pair.stops):
            for stop in pair.stops:
                found.setdefault(stop and stop.key, stop and LockstepStop(pair.task, stop.place))
    return found


def _name_of(key: Key | None) -> str:
    """The first name on disk in a key."""
    while isinstance(key, tuple) and key:
        key = key[0]
    return "the end" if key is None else str(key)
