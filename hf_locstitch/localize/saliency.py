"""Localizing with one look at the data: the k largest |gradient · task vector|."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hf_locstitch.localize.magnitude import Magnitude
from hf_locstitch.localize.with_data import WithData


class Saliency(WithData, Magnitude):
    """density, scope: as in Magnitude. at: where on the line base (0) → finetuned (1) gradients are taken.

    Several points: their mean gradient. On the data that an expert was trained on its loss is flat near 1, so that
    points far from the base tell little unless the data is held out; the base (0) serves with either.
    """

    method: Literal["saliency"] = "saliency"  # pyright: ignore[reportIncompatibleVariableOverride]
    at: tuple[float, ...] = Field(default=(0.0,), min_length=1, max_length=16)

    def describe(self) -> str:
        scope = "over the whole model" if self.scope == "model" else "inside each tensor"
        points = ", ".join(f"{point:g}" for point in self.at)
        return f"saliency, density {self.density:g}, largest |gradient · task vector| {scope}, gradients at {points}"
