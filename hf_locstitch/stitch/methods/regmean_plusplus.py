"""RegMean++: as RegMean, but each block gets what the blocks before it give in the merged model. Source: Nguyen et al.,
RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging, TMLR 2026,
arXiv 2508.03121."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from hf_locstitch.runtime.human import counted
from hf_locstitch.stitch.fitting import Fittable
from hf_locstitch.stitch.methods.regmean import RegMean
from hf_locstitch.stitch.shared_layers import shared_layers


class RegMeanPlusPlus(RegMean):
    """alpha: factor on the off-diagonal elements of the Gram matrices."""

    name: Literal["regmean-plusplus"] = "regmean-plusplus"  # pyright: ignore[reportIncompatibleVariableOverride]
    title: ClassVar[str] = "RegMean++"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.03121"
    called: ClassVar[str] = "RegMean++"
    merged_inputs: ClassVar[bool] = True

    def plan_warnings(self, fittable: Fittable) -> list[str]:
        if not (shared := shared_layers(fittable.base)):
            return []
        return [
            f"{shared}, and RegMean++ fits a layer at its last use: the uses before it still have the mean. --method "
            "regmean makes no difference between uses."
        ]

    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        tensors = counted(len(record["refitted"]), "tensor")
        return f"""## Fitted values

In {tensors} (the weight matrices of linear layers), values were fitted so that on unlabelled inputs of every
finetune, each layer's outputs match those of that finetuned model's layer, block by block, each of that model's blocks
given what the blocks before it give in the merged model (using Gram matrices of activations, alpha {record["alpha"]}).
All other tensors are the plain mean of the finetuned tensors.

{inputs}"""


COMPONENT = RegMeanPlusPlus
