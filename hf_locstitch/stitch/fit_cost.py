"""What fitting values will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_locstitch.runtime.human import human

LIBRARIES = 470_000_000  # bytes: transformers and datasets, and what the allocator keeps of threads; measured


@dataclass(frozen=True)
class FitCost:
    """Bytes in each process, but for tokens and inputs (of all finetunes together, at most), flops (of all lambdas) and
    values.

    weights: copies of the largest matrix, or of the experts of a layer in every model.
    moments: Gram matrices and right-hand sides. states: what a process's inputs hold at a stop, in both models, on the
    device; aside: in memory or on the disk, as `states_on` says. outputs: of the batches that end at once.
    values: the refitted values of two lambdas, on the disk.
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
        """Bytes of all processes together."""
        return self.values + (self.processes * self.aside if self.states_on == "disk" else 0)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}

    def describe(self) -> str:
        """For a person, one line."""
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        aside = f", {human(self.aside)} of them put away" if self.aside else ""
        return (
            f"fitting    about {human(self.peak)} of memory at most{each} ({human(self.weights)} one linear of the "
            f"models, {human(self.moments)} Gram matrices, {human(self.states)} hidden states of {self.inputs} inputs, "
            f"at most {self.tokens:,} tokens{aside}, {human(self.outputs)} outputs), {human(self.disk)} of disk; "
            f"{self.flops / 1e12:.3g} TFLOP"
        )
