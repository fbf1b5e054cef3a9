"""Localize-and-Stitch: the mean of the finetuned values under the masks. Source: arXiv 2408.13656."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, MaskedMethod

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_source import MaskedValues
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.mean import Coverage

CITATION = """@article{he2025localize,
  title   = {Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic},
  author  = {He, Yifei and Hu, Yuzheng and Lin, Yong and Zhang, Tong and Zhao, Han},
  journal = {Transactions on Machine Learning Research},
  year    = {2025},
  url     = {https://arxiv.org/abs/2408.13656}
}"""


class LocStitch(MaskedMethod):
    name: Literal["locstitch"] = "locstitch"
    title: ClassVar[str] = "Localize-and-Stitch"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.13656"
    citation: ClassVar[str] = CITATION
    blocks_only: ClassVar[bool] = True

    def combine(self, base: Values, kept: Sequence[MaskedValues], covered: Coverage, context: Context) -> Values:
        from hf_locstitch.stitch.mean import stitch  # slow to import, not needed for planning

        return stitch(base, kept, covered, scale=context.scale, dtype=context.dtype)

    def introduce(self, models: int, fitted: str | None, joint: bool) -> str:
        plural = "model" if models == 1 else "models"
        values = (
            f"are changed in the base, to values {fitted}."
            if fitted
            else "are stitched into the base, and where masks overlap, the finetuned values are averaged."
        )
        skills = "the finetunes' skills together" if joint else "each\nfinetune's skill"
        return (
            f"A merge of {models} finetuned {plural} by\n[{self.title}]({self.paper}): a binary mask selects the few "
            f"weights that carry {skills}; only those {values}"
        )


COMPONENT = LocStitch
