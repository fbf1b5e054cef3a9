"""What fitting values will cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hf_locstitch.runtime.human import counted, human, in_each

LIBRARIES = 660_000_000  # bytes: torch, transformers and its code for a model, and what the allocator keeps; measured


class Cost(Protocol):
    """What fitting values will cost, at most. Bytes: peak of memory in each process; disk of all together."""

    @property
    def peak(self) -> int: ...

    @property
    def disk(self) -> int: ...

    def describe(self) -> str:
        """For people, one line."""
        ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Successive:
    """Of two fits, one after the other; the first leaves its files."""

    first: Cost
    then: Cost

    @property
    def peak(self) -> int:
        return max(self.first.peak, self.then.peak)

    @property
    def disk(self) -> int:
        return self.first.disk + self.then.disk

    def describe(self) -> str:
        return f"{self.first.describe()}\n{self.then.describe()}"

    def as_json(self) -> dict[str, Any]:
        return {**self.then.as_json(), "start": self.first.as_json(), "peak": self.peak, "disk": self.disk}


@dataclass(frozen=True)
class FitCost:
    """Bytes in each process, except tokens and inputs (of all finetunes together, at most), flops (of all lambdas) and
    values.

    weights: copies of the largest matrix, or of the experts of a layer in every model. moments: Gram matrices and
    right-hand sides. states: hidden states of a process's inputs at a stop, in both models, on the device; aside:
    offloaded to memory or disk, as `states_on` says. outputs: of batches that finish together. values: the refitted
    values of two lambdas, on disk.
    """

    weights: int
    moments: int
    states: int
    aside: int
    outputs: int
    values: int
    states_on: str
    inputs: int
    tokens: int
    flops: float
    processes: int = 1

    @property
    def peak(self) -> int:
        return LIBRARIES + self.weights + self.moments + self.states + self.outputs

    @property
    def disk(self) -> int:
        """Bytes on disk, of all processes together."""
        return self.values + (self.processes * self.aside if self.states_on == "disk" else 0)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}

    def describe(self) -> str:
        """For people, one line."""
        each = in_each(self.processes)
        place = "disk" if self.states_on == "disk" else "memory"
        aside = f", {human(self.aside)} offloaded to {place}" if self.aside else ""
        return (
            f"fitting    at most about {human(self.peak)} of memory{each} ({human(self.weights)} one linear layer of "
            f"the models, {human(self.moments)} Gram matrices, {human(self.states)} hidden states of "
            f"up to {counted(self.inputs, 'input')} with at most {counted(self.tokens, 'token')}{aside}, "
            f"{human(self.outputs)} outputs), {human(self.disk)} of disk; "
            f"{self.flops / 1e12:.3g} TFLOP"
        )
