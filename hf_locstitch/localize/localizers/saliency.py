"""Localizing with one pass over the data: the k largest |gradient · task vector|."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hf_locstitch.localize.data_localizer import DataLocalizer
from hf_locstitch.localize.density import TopShare

if TYPE_CHECKING:
    from hf_locstitch.localize.grafted_model import GraftedModel
    from hf_locstitch.localize.learn import Learned, Room
    from hf_locstitch.tasks.task import Task


class Saliency(DataLocalizer, TopShare):
    """density, scope: as in Magnitude. at: where on the line base (0) → finetuned (1) gradients are taken.

    Several points: their mean gradient. On the data that a finetune was trained on, its loss is flat near 1, so
    points far from the base tell little unless the data is held out; the base (0) works with either.
    """

    method: Literal["saliency"] = "saliency"
    at: tuple[float, ...] = Field(default=(0.0,), min_length=1, max_length=16)

    def describe(self) -> str:
        points = ", ".join(f"{point:g}" for point in self.at)
        return (
            f"saliency, density {self.density:g}, largest |gradient · task vector| {self.where}, gradients at {points}"
        )

    def passes(self, numbers: int) -> int:
        return len(self.at)

    def learn(self, grafted: GraftedModel, task: Task, room: Room) -> Learned:
        from hf_locstitch.localize.learn import Learned, saliency_scores

        return Learned(saliency_scores(self, grafted, task, room), [])


COMPONENT = Saliency
