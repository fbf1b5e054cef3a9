"""A localizer: the entries that change most for their size."""

from typing import Literal

import numpy as np

from hf_locstitch.localize.density import TopShare


class Relative(TopShare):
    """floor: added to |base|, so that tiny weights do not win."""

    method: Literal["relative"] = "relative"
    floor: float = 1e-3

    def describe(self):
        return f"relative, density {self.density:g}, largest |task vector| / |base| {self.where}"

    def scores(self, tensor, first, finetuned, base):
        start = base.astype(np.float32)
        change = np.abs(finetuned.astype(np.float32) - start)
        return (change / (np.abs(start) + self.floor)).astype(np.float32)
