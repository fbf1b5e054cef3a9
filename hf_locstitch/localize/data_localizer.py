"""A localizer that uses data: it learns scores, then selects masks as other localizers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_locstitch.localize.job import Cost, LocalizeJob, Localizing
from hf_locstitch.localize.with_data import WithData

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_source import MaskSource


class DataLocalizer(WithData):
    """Subclasses implement WithData.learn."""

    def cost(self, localizing: Localizing) -> Cost | None:
        from hf_locstitch.localize.cost import learning_cost  # reads objectives, slow to import

        return learning_cost(self, localizing)

    def find_masks(self, job: LocalizeJob) -> Mapping[str, MaskSource]:
        from hf_locstitch.localize.search_with_data import find_with_data  # slow to import

        return find_with_data(self, job)
