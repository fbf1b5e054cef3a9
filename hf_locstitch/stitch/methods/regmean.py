"""RegMean: linear layers by regression on the outputs of each finetuned model's own, all else the plain mean. Source:
Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv 2212.09849."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hf_locstitch.runtime.human import counted
from hf_locstitch.stitch.fitting import FitJob, Fittable, LayerByLayer
from hf_locstitch.stitch.method import Context, DenseMethod
from hf_locstitch.stitch.methods.average import mean_of

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.fit_cost import FitCost
    from hf_locstitch.stitch.fitted_values import FittedValues


class RegMean(LayerByLayer, DenseMethod):
    """alpha: factor on the off-diagonal elements of the Gram matrices. It is 0.1 in the authors' configurations for
    emotions and 1 in those for GLUE (github.com/bloomberg/dataless-model-merging, src/configs/exps).
    """

    name: Literal["regmean"] = "regmean"
    title: ClassVar[str] = "RegMean"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.09849"
    needs_data: ClassVar[bool] = True
    called: ClassVar[str] = "RegMean"
    merged_inputs: ClassVar[bool] = False  # whether blocks see what the merged model computes, not each finetuned one
    alpha: float = Field(default=0.9, ge=0, le=1)

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """The mean, for tensors that are not fitted."""
        return mean_of(base, finetuned, context)

    def describe(self) -> str:
        inputs = f"{counted(self.inputs, 'input')} per finetune of at most {counted(self.tokens, 'token')}"
        return f"{self.title} on up to {inputs}, alpha {self.alpha:g}"

    def cost(self, fittable: Fittable) -> FitCost | None:
        from hf_locstitch.stitch.refit.cost import regmean_cost  # imports torch

        return regmean_cost(self, fittable)

    def fit(self, job: FitJob) -> tuple[FittedValues | None, dict[str, Any]]:
        from hf_locstitch.stitch.refit.regression_mean import regmean  # slow to import

        return regmean(self, job)

    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        tensors = counted(len(record["refitted"]), "tensor")
        return f"""## Fitted values

In {tensors} (the weight matrices of linear layers), values were fitted so that on unlabelled inputs of every
finetune, each layer's outputs match those of that finetuned model (using Gram matrices of its own activations, alpha
{record["alpha"]}). All other tensors are the plain mean of the finetuned tensors.

{inputs}"""


COMPONENT = RegMean
