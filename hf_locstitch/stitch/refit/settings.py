"""The settings that fitting uses, of the components that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from hf_locstitch.tasks.sets import OpenSet

JUDGED = 1 << 26  # numbers of the outputs of a held-out batch, at most: logits can be far more than hidden states
# judge -> the name of the scores in the record, and their introduction on the card.
SCORES: Mapping[str, tuple[str, str]] = {
    "agreement": ("disagreement", "Distance of hidden states from the finetuned models' on held-out inputs (base: 1)"),
    "loss": ("loss", "Loss on the held-out inputs and their labels"),
    "accuracy": ("error", "Share of wrong answers on the held-out inputs"),
}


class InputSettings(Protocol):
    """As of OnInputs."""

    @property
    def inputs(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def labelled(self) -> bool: ...

    def most_inputs(self, data: OpenSet) -> int: ...

    def as_record(self) -> dict[str, Any]: ...


class LayerByLayerSettings(InputSettings, Protocol):
    """As of LayerByLayer."""

    @property
    def batch(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def states_on(self) -> str: ...


class RegMeanSettings(LayerByLayerSettings, Protocol):
    """As of methods/regmean.py and regmean_plusplus.py."""

    merged_inputs: ClassVar[bool]

    @property
    def alpha(self) -> float: ...


class RefitSettings(LayerByLayerSettings, Protocol):
    """As of stitchers/refit.py."""

    @property
    def judge(self) -> Literal["agreement", "loss", "accuracy"]: ...

    @property
    def lambdas(self) -> tuple[float, ...]: ...

    @property
    def ridge(self) -> float: ...

    @property
    def steps(self) -> int: ...

    def counts(self, inputs: int) -> tuple[int, int]: ...
