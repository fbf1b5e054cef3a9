"""What a finetune is asked to be: the fields of a YAML recipe, of the command line's flags and of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.plan.recipe import Strict
from hf_locstitch.plan.validation import validated
from hf_locstitch.tasks.sets import LocalizationSet

DESTINATION = ("out", "push_to", "private", "create_pr", "device")  # fields that say nothing of the finetune itself


class FinetuneRequest(Strict):
    """One finetune. Every field but `base` and `data` has a default; those that are None follow from the objective."""

    base: str = Field(min_length=1)
    """A folder or org/name[/subfolder][@revision]."""
    data: LocalizationSet
    """The examples, and under `objective` what the model is to learn from them."""
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Where the learning rate begins; it falls to 0 in equal steps."""
    batch: int | None = Field(default=None, ge=1)
    """Examples in a step."""
    optimizer: Literal["sgd", "adamw_torch"] | None = None
    """As transformers names it; without weight decay and momentum."""
    freeze: tuple[str, ...] | None = None
    """Globs of parameters, as transformers names them, that stay the base's; none for an empty list."""
    lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA adapter to train in place of the weights of the linear layers."""
    seed: int = Field(default=0, ge=0)
    """Of new heads, of the order of the examples and of dropout."""
    device: Literal["auto", "cpu"] = "auto"
    out: Path | None = None
    push_to: str | None = None
    private: bool = False
    create_pr: bool = False

    @field_validator("out")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_home(value)

    def dump(self) -> str:
        """YAML for the same finetune."""
        fields = self.model_dump(mode="json", exclude={*DESTINATION, "data"}, exclude_defaults=True)
        return yaml.safe_dump({**fields, "data": self.data.dump()}, sort_keys=False, allow_unicode=True)


def make_request(
    fields: Mapping[str, Any],
    where: str = "request",
    *,
    number: int | None = None,
    objective: str | Mapping[str, Any] | None = None,
) -> FinetuneRequest:
    """Validate. number, objective: in place of what the data says. Raises RecipeError with every fault at once."""
    objective = {"kind": objective} if isinstance(objective, str) else objective
    given = {key: value for key, value in {"number": number, "objective": objective}.items() if value is not None}
    if given and "data" in fields:
        data = fields["data"]
        fields = {**fields, "data": {**(data if isinstance(data, Mapping) else {"ref": str(data)}), **given}}
    return validated(FinetuneRequest, fields, where, {"data": LocalizationSet})
