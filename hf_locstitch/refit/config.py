"""How values are fitted to inputs, as a recipe says it: under masks (Refit), or of whole models (RegMean)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from hf_locstitch.data.sets import LocalizationSet

ENOUGH = 32  # held-out inputs of a finetune that tell one lambda from another; measured, docs/quality.md
JUDGED = 1 << 26  # numbers of the outputs of a held-out batch, at most: logits can be far more than hidden states
Stiffness = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json"),
]


class OnInputs(BaseModel):
    """data: unlabelled inputs of each finetune, by name or in order; the recipe's `data` unless given.

    inputs: how many of each; each is cut to `tokens`. batch: inputs that pass through the models together; results do
    not depend on it but for rounding. device: "auto" takes the accelerator if there is one.
    states_on: where the hidden states of a batch lie while others pass: "cpu" is this machine's memory, "disk" files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: dict[str, LocalizationSet] | tuple[LocalizationSet, ...] = ()
    inputs: int = Field(default=256, ge=1)
    tokens: int = Field(default=128, ge=1)
    batch: int = Field(default=32, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    states_on: Literal["device", "cpu", "disk"] = "device"

    def dump(self) -> dict[str, Any]:
        """What asks for the same, without its data."""
        return self.model_dump(mode="json", exclude={"data"})

    def warnings(self) -> list[str]:
        """What a person should know before the work starts."""
        return []


class RegMean(OnInputs):
    """alpha: factor on what lies off the diagonals of the Gram matrices. It is 0.1 in the authors' configurations for
    emotions and 1 in those for GLUE (github.com/bloomberg/dataless-model-merging, src/configs/exps).
    """

    method: Literal["regmean"] = "regmean"
    alpha: float = Field(default=0.9, ge=0, le=1)

    def describe(self) -> str:
        return f"regression mean on {self.inputs} inputs each of at most {self.tokens} tokens, alpha {self.alpha:g}"


class Refit(OnInputs):
    """held_out: the share of the inputs that is not fitted to but judges the lambdas.

    lambdas: how much stiffer each weight is made than its inputs alone make it; "inf" is the plain stitch. With
    several, the best on held-out inputs is taken, as `judge` says: by "agreement" of the outputs with the finetuned
    models', or, where inputs have labels, by "loss" or "accuracy" (of tokens, for a language model).
    ridge: in units of the mean squared input. steps: of conjugate gradients.
    """

    method: Literal["refit"] = "refit"
    held_out: float = Field(default=0.25, ge=0, lt=1)
    judge: Literal["agreement", "loss", "accuracy"] = "agreement"
    lambdas: tuple[Stiffness, ...] = Field(default=(0.0, 0.1, 0.3, 1.0, math.inf), min_length=1)
    ridge: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    steps: int = Field(default=12, ge=1)

    @model_validator(mode="after")
    def _can_choose(self) -> Refit:
        if any(math.isnan(value) for value in self.lambdas) or len(set(self.lambdas)) < len(self.lambdas):
            raise ValueError("lambdas must differ from one another and be numbers, or inf")
        if len(self.lambdas) > 1 and self.counts(self.inputs)[1] == 0:
            raise ValueError(
                f"{len(self.lambdas)} lambdas are to be judged on held-out inputs, but of {self.inputs} inputs a share "
                f"of {self.held_out:g} is none: raise inputs or held_out, or give one lambda"
            )
        return self

    def counts(self, inputs: int) -> tuple[int, int]:
        """How many of so many inputs are fitted to, and how many are held out."""
        held_out = round(self.held_out * inputs)
        return inputs - held_out, held_out

    def warnings(self) -> list[str]:
        """Where the choice of lambda would rest on little."""
        held_out = self.counts(self.inputs)[1]
        if len(self.lambdas) == 1 or held_out >= ENOUGH:
            return []
        return [
            f"lambda is chosen on {held_out} held-out inputs of each finetune: with fewer than {ENOUGH} a refit may be "
            "worse than the mean elsewhere. Raise inputs or held_out, or name one lambda."
        ]

    def describe(self) -> str:
        lambdas = ", ".join(f"{value:g}" for value in self.lambdas)
        fitted, held_out = self.counts(self.inputs)
        judged = f", judged by {self.judge} on {held_out} held out" if len(self.lambdas) > 1 else ""
        return f"refit on {fitted} inputs each of at most {self.tokens} tokens, lambda of {lambdas}{judged}"


Fitting = Annotated[Refit | RegMean, Field(discriminator="method")]
FITTINGS: Mapping[str, type[OnInputs]] = MappingProxyType({"refit": Refit, "regmean": RegMean})


def read_stitch(value: Any) -> Any:
    """What `stitch:` may be: mean, refit, or the fields of a refit or of RegMean."""
    if value == "mean" or (isinstance(value, dict) and value.get("method") == "mean" and len(value) == 1):
        return None
    if isinstance(value, dict):
        return {"method": "refit", **value}
    return {"method": value} if value in FITTINGS else value
