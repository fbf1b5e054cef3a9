"""RegMean++: as RegMean, but each block gets what the blocks before it give in the merged model. Source: Nguyen et al.,
RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging, TMLR 2026,
arXiv 2508.03121."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from hf_locstitch.stitch.methods.regmean import RegMean


class RegMeanPlusPlus(RegMean):
    """alpha: factor on the off-diagonal elements of the Gram matrices."""

    name: Literal["regmean-plusplus"] = "regmean-plusplus"  # pyright: ignore[reportIncompatibleVariableOverride]
    title: ClassVar[str] = "RegMean++"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.03121"
    called: ClassVar[str] = "RegMean++"
    merged_inputs: ClassVar[bool] = True

    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        count = len(record["refitted"])
        tensors = "1 tensor" if count == 1 else f"{count} tensors"
        return f"""## Fitted values

In {tensors} (the weight matrices of linear layers), values were fitted so that on unlabelled inputs of every
finetune, each layer's outputs match those of that finetuned model's layer, block by block, each of that model's blocks
given what the blocks before it give in the merged model (using Gram matrices of activations, alpha {record["alpha"]}).
All other tensors are the plain mean of the finetuned tensors.

{inputs}"""


COMPONENT = RegMeanPlusPlus
