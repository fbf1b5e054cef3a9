"""Densities: the share of the elements that a mask keeps, exact to one element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from hf_locstitch.localize.job import Group
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.runtime.shares import exact_share


class TopShare(Localizer):
    """A localizer whose masks keep a fixed share of the elements.

    density: share of the localizable elements that a mask keeps, 0 … 1. scope: "model" takes the top k over all
    localizable tensors together (as in the paper), "tensor" within each tensor.
    """

    method: Any = None
    density: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    scope: Literal["model", "tensor"] = "model"

    def groups(self, numels: Sequence[int]) -> list[Group]:
        if self.scope == "model":
            return [(list(range(len(numels))), exact_share(self.density, sum(numels)))]
        return [([tensor], exact_share(self.density, numel)) for tensor, numel in enumerate(numels)]

    def scoring(self) -> dict[str, Any] | None:
        return self.model_dump(mode="json", exclude={"density"})

    @property
    def where(self) -> str:
        """The scope, for people."""
        return "over the whole model" if self.scope == "model" else "within each tensor"
