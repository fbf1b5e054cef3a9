"""Localizing without data: the k largest |task vector| entries. Source: arXiv 2408.13656, section 3.2."""

from __future__ import annotations

from typing import Literal

from hf_locstitch.localize.density import TopShare


class Magnitude(TopShare):
    """density: share of the localizable elements that a mask keeps, 0 … 1.

    scope: "model" takes the top k over all localizable tensors together (as in the paper), "tensor" within each.
    """

    method: Literal["magnitude"] = "magnitude"

    def describe(self) -> str:
        return f"{self.method}, density {self.density:g}, largest |task vector| {self.where}"


COMPONENT = Magnitude
