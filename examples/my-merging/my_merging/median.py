"""A method: the median of the finetuned models."""

from typing import ClassVar, Literal

import numpy as np

from hf_locstitch.stitch.method import DenseMethod


class Median(DenseMethod):
    name: Literal["median"] = "median"
    title: ClassVar[str] = "Median"
    paper: ClassVar[str] = "https://en.wikipedia.org/wiki/Median"

    def combine(self, base, finetuned, context):
        start = base.astype(np.float64)
        middle = np.median([values.astype(np.float64) for values in finetuned], axis=0)
        return (start + context.scale * (middle - start)).astype(context.dtype)
