"""A stitcher: the plain stitch, drawn back towards the base."""

from typing import ClassVar, Literal

import numpy as np

from hf_locstitch.checkpoints.tensors import as_tensor
from hf_locstitch.stitch.fitted_values import FittedWriter, open_fitted
from hf_locstitch.stitch.fitting import Stitcher
from hf_locstitch.stitch.mean import coverage


class Damped(Stitcher):
    """factor: what the change under the masks is multiplied with."""

    method: Literal["damped"] = "damped"
    called: ClassVar[str] = "damped stitching"
    factor: float = 0.5

    def describe(self):
        return f"damped by {self.factor:g}"

    def cost(self, fittable):
        return None

    def fit(self, job):
        writer = FittedWriter(job.folder / "damped", job.own, job.processes)
        for info in job.tensors:
            if writer.writes([info.name]):
                pieces = [self._piece(job.view, info.name, chunk) for chunk in job.view.chunks[info.name]]
                writer.write(info.name, job.view.dtypes[info.name], pieces)
        writer.finish("damped")
        fitted = open_fitted(job.folder / "damped", "damped", job.own, job.processes)
        counts = {name: {"fitted": 0, "held_out": 0} for name in job.data}  # of inputs: this one looks at none
        return fitted, {**self.as_record(), "counts": counts, "refitted": [info.name for info in job.tensors]}

    def card(self, record, inputs):
        return f"## Damped values\n\nChanges under the masks are multiplied by {record['factor']}.\n\n{inputs}"

    def _piece(self, view, tensor, chunk):
        """The values under the masks in a chunk, ascending, in the output's dtype."""
        under = np.flatnonzero(coverage(chunk.count, view.kept(chunk)).times)
        base = view.base.values(tensor, chunk.first, chunk.count)[under].astype(np.float64)
        plain = view.values(tensor, chunk)[under]
        return as_tensor((base + self.factor * (plain.astype(np.float64) - base)).astype(plain.dtype))
