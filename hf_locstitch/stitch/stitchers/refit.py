"""A refit: the values under the masks are fitted, layer by layer, to what the finetuned models compute on inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, model_validator

from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.escape import markdown
from hf_locstitch.runtime.human import counted
from hf_locstitch.stitch.fit_cost import Successive
from hf_locstitch.stitch.fitting import FitJob, Fittable, Stitcher
from hf_locstitch.stitch.refit.settings import SCORES
from hf_locstitch.stitch.shared_layers import shared_layers

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.checkpoint import Checkpoint
    from hf_locstitch.stitch.fit_cost import Cost
    from hf_locstitch.stitch.fitted_values import FittedValues
    from hf_locstitch.tasks.sets import OpenSet

WITHOUT_DATA = ("method", "device")  # the settings that apply then
SOLVED = """solved for from
the task vectors alone. A finetune's update of a linear layer tells which inputs that layer was trained on
([WUDI-Merging](https://arxiv.org/abs/2503.08099)), so the merged layer can be the one that gives, on the inputs of each
task, what that task's layer gives, as far as possible ([RegMean](https://arxiv.org/abs/2212.09849), which takes data
for it); solving for all tasks together inside masks is hf-locstitch's own"""
ENOUGH = 32  # held-out inputs of a finetune that suffice to choose lambda; measured, docs/quality.md
Lambda = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json"),
]


class Refit(Stitcher):
    """held_out: the share of the inputs that is not used for the fit but to choose lambda.

    start: where the fit to inputs begins: at the refit without data ("dataless"), or at the "mean" of the finetuned
    values. lambdas: strength of the regularization towards that start; "inf" is the start itself. With several, the
    best on held-out inputs is taken, by `judge`: "agreement" of the last hidden states with the finetuned models', or,
    where inputs have labels, "loss" or "accuracy" (of tokens, for a language model).
    ridge: in units of the mean squared input. steps: of conjugate gradients.
    """

    method: Literal["refit"] = "refit"
    called: ClassVar[str] = "a refit"
    data_optional: ClassVar[bool] = True
    held_out: float = Field(default=0.25, ge=0, lt=1)
    judge: Literal["agreement", "loss", "accuracy"] = "agreement"
    start: Literal["dataless", "mean"] = "dataless"
    lambdas: tuple[Lambda, ...] = Field(default=(0.0, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf), min_length=1)
    ridge: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    steps: int = Field(default=12, ge=1)

    @model_validator(mode="after")
    def _can_choose(self) -> Refit:
        if any(math.isnan(value) for value in self.lambdas) or len(set(self.lambdas)) < len(self.lambdas):
            raise ValueError("lambdas must be distinct numbers, or inf")
        if len(self.lambdas) > 1 and self.counts(self.inputs)[1] == 0:
            raise ValueError(
                f"choosing among {len(self.lambdas)} lambdas needs held-out inputs, but held_out {self.held_out:g} of "
                f"{counted(self.inputs, 'input')} is none: raise inputs or held_out, or set a single lambda"
            )
        return self

    @property
    def labelled(self) -> bool:
        return self.judge != "agreement"

    def as_record(self) -> dict[str, Any]:
        """What applies: without data, little does."""
        fields = super().as_record()
        return fields if self.data else {key: fields[key] for key in WITHOUT_DATA}

    def counts(self, inputs: int) -> tuple[int, int]:
        """How many of so many inputs are used for the fit, and how many are held out."""
        held_out = round(self.held_out * inputs)
        return inputs - held_out, held_out

    def warnings(self, data: Mapping[str, OpenSet]) -> list[str]:
        """Warn if lambda would be chosen on few inputs."""
        held_out = {name: self.counts(self.most_inputs(found))[1] for name, found in data.items()}
        few = [f"{count} of {name}" for name, count in held_out.items() if count < ENOUGH]
        if len(self.lambdas) == 1 or not few:
            return []
        return [
            f"lambda is chosen on few held-out inputs ({', '.join(few)}): with fewer than {ENOUGH} of a finetune, a "
            "refit may be worse than its start on other inputs. Give more data, raise inputs or held_out, or set a "
            "single lambda."
        ]

    def plan_warnings(self, fittable: Fittable) -> list[str]:
        from hf_locstitch.stitch.dataless.layers import layer_warnings  # slow to import

        localized = [info.name for info in fittable.mask_tensors]
        return list(layer_warnings(fittable.base, localized)) if self._solves(fittable) else []

    def _solves(self, fittable: Fittable) -> bool:
        """Whether a solution without data is needed, if only for the mask."""
        return not self.data or self.start == "dataless" or fittable.joint

    def how_found(self, record: Mapping[str, Any]) -> str | None:
        if not record.get("refitted"):
            return None
        if record.get("lambda", "inf") == "inf":
            return "solved for from the finetunes' task vectors alone"
        return super().how_found(record)

    def describe(self) -> str:
        if not self.data:
            return "refit without data, from the task vectors alone"
        lambdas = ", ".join(f"{value:g}" for value in self.lambdas)
        fitted, held_out = self.counts(self.inputs)
        inputs = f"{counted(fitted, 'input')} per finetune of at most {counted(self.tokens, 'token')}"
        judges = f", chosen by {self.judge} on up to {counted(held_out, 'held-out input')}"
        return f"refit on up to {inputs}, lambda {lambdas}{judges if len(self.lambdas) > 1 else ''}"

    def check(self, finetuned: Mapping[str, Checkpoint], data: Mapping[str, OpenSet]) -> None:
        for checkpoint in finetuned.values() if self.data else ():
            _refuse_shared_layers(checkpoint)
        if self.labelled:
            from hf_locstitch.stitch.refit.models import check_labels  # slow to import

            check_labels(f"judge: {self.judge}", "judge: agreement", self.inputs, finetuned, data)

    def cost(self, fittable: Fittable) -> Cost | None:
        from hf_locstitch.stitch.dataless.cost import dataless_cost  # slow to import
        from hf_locstitch.stitch.refit.cost import refit_cost

        without = dataless_cost(fittable) if self._solves(fittable) else None
        fitted = refit_cost(self, fittable) if self.data else None
        return fitted or without if without is None or fitted is None else Successive(without, fitted)

    def fit(self, job: FitJob) -> tuple[FittedValues | None, dict[str, Any]]:
        from hf_locstitch.stitch.dataless.fit import fit_without_data, go_on_from  # slow to import
        from hf_locstitch.stitch.refit.lambda_search import refit

        if not self.data:
            values, record = fit_without_data(job, self.device)
            return values, {**self.as_record(), **record}
        if self.start == "mean":
            return refit(self, job)
        begun, begun_record = fit_without_data(job, self.device)
        values, record = refit(self, replace(job, view=replace(job.view, fitted=begun)))
        return go_on_from(begun, begun_record, values, record)

    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        return "\n\n".join(_sections(record, inputs) if self.data else _sections_without_data(record))


def _refuse_shared_layers(checkpoint: Checkpoint) -> None:
    """Raises RecipeError for an Albert: to fit a layer where it is first used would spoil its other uses."""
    if shared := shared_layers(checkpoint):
        raise RecipeError(
            f"{shared}, and a refit on inputs fits a layer where it is used once. Use a refit without inputs, or "
            "--method regmean, which adds up the inputs of all uses."
        )


def _sections_without_data(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Refitted values"
    tensors, steps = counted(len(record["refitted"]), "tensor"), counted(record["steps"], "step")
    yield f"""The values under the masks are not finetuned values, nor their mean: in {tensors} they were {SOLVED}
(ridge {record["ridge"]}, {steps} of conjugate gradients). Nothing outside the masks changed."""
    yield from _notes(record, "the finetuned values, or their mean")


def _sections(record: Mapping[str, Any], inputs: str) -> Iterator[str]:
    dataless = record["start"] == "dataless"
    tensors, steps = counted(len(record["refitted"]), "tensor"), counted(record["steps"], "step")
    begin = "what is found without data" if dataless else "the mean of the finetuned values"
    yield "## Refitted values"
    if record["lambda"] != "inf":
        by_labels = record["judge"] != "agreement" and len(record[SCORES[record["judge"]][0]]) > 1
        inputs_of, chosen = ("inputs", ", chosen by their labels") if by_labels else ("unlabelled inputs", "")
        yield f"""The values under the masks are not finetuned values, nor their mean: in
{tensors} they were fitted, layer by layer in the order of the forward pass, so that on
{inputs_of} of every finetune, each linear layer's outputs match those of the same layer in that finetuned model (masked
least squares from {begin}, lambda {record["lambda"]}{chosen}, ridge {record["ridge"]}, {steps} of
conjugate gradients). Nothing outside the masks changed."""
    else:
        yield (
            f"On held-out inputs (judged by {record['judge']}), no lambda was better than {begin}, so that was kept"
            + (f": in {tensors} the values were {SOLVED}." if dataless else ".")
        )
    yield inputs
    title, sentence = SCORES[record["judge"]]
    if len(curve := record[title]) > 1:
        yield f"{sentence} (inf: {begin}):"
        rows = [
            f"| {f'**{name}**' if name == record['lambda'] else name} | {score:.4g} |" for name, score in curve.items()
        ]
        yield "\n".join([f"| lambda | {title} |", "| :--- | ---: |", *rows])
    yield from _notes(record, begin)


def _notes(record: Mapping[str, Any], otherwise: str) -> Iterator[str]:
    yield from (f"> {markdown(note)}" for note in record["notes"])
    if kept := record["kept_plain"]:
        matrices = "1 matrix keeps" if len(kept) == 1 else f"{len(kept)} matrices keep"
        first = markdown(": ".join(next(iter(kept.items()))))
        listed = "[locstitch.json](locstitch.json) lists them"
        yield f"{matrices} {otherwise} (for example {first}); {listed}."


COMPONENT = Refit
