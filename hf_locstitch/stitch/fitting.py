"""Fitting values to inputs, under masks or in whole models: what all such methods have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hf_locstitch.runtime.devices import AUTO, DeviceName
from hf_locstitch.runtime.packages import WITH_DATA
from hf_locstitch.tasks.sets import LocalizationSet

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.checkpoint import Checkpoint
    from hf_locstitch.checkpoints.header import TensorInfo
    from hf_locstitch.checkpoints.reader import CheckpointReader
    from hf_locstitch.runtime.processes import Processes
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.runtime.settings import Settings
    from hf_locstitch.stitch.fit_cost import Cost
    from hf_locstitch.stitch.fitted_values import FittedValues
    from hf_locstitch.stitch.view import StitchView
    from hf_locstitch.tasks.sets import OpenSet


class Fittable(Protocol):
    """What fitting knows before the work starts, from the plan: headers and configs only."""

    @property
    def base(self) -> Checkpoint: ...

    @property
    def finetuned(self) -> Mapping[str, Checkpoint]: ...

    @property
    def mask_tensors(self) -> Sequence[TensorInfo]: ...

    @property
    def fit_data(self) -> Mapping[str, OpenSet]: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def joint(self) -> bool: ...

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...


@dataclass(frozen=True)
class FitJob:
    """All that is needed to fit values. Every process makes the same calls.

    view: the plain stitch, with complete masks. readers: of the inputs by name, mapped. order: of the finetunes in
    sums. tensors: those that are merged. data: inputs of each finetune. own: the tensors whose values this process
    writes and will read. folder: for temporary files, shared by all processes; what earlier ones finished there is
    reused. spill: the folder for those of the whole merge, where finding masks left its own.
    """

    view: StitchView
    readers: Mapping[str, CheckpointReader]
    order: Sequence[str]
    tensors: Sequence[TensorInfo]
    data: Mapping[str, OpenSet]
    own: Collection[str]
    folder: Path
    spill: Path
    settings: Settings
    processes: Processes
    progress: Progress


class OnInputs(BaseModel, ABC):
    """data: unlabelled inputs of each finetune, by name or in order; the recipe's `data` unless given.

    inputs: how many per finetune; each is cut to `tokens`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    called: ClassVar[str]  # in messages: "a refit"
    data_optional: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = WITH_DATA
    data: dict[str, LocalizationSet] | tuple[LocalizationSet, ...] = ()
    inputs: int = Field(default=256, ge=1)
    tokens: int = Field(default=128, ge=1)

    @property
    def labelled(self) -> bool:
        """Whether the inputs' labels are used."""
        return False

    def as_record(self) -> dict[str, Any]:
        """The settings as in the manifest, without the data."""
        fields = self.model_dump(mode="json", exclude={"data"})
        return {"method": fields.pop("name"), **fields} if "name" in fields else fields

    def most_inputs(self, data: OpenSet) -> int:
        """How many inputs of a finetune are used, at most: fewer than asked for where its file holds fewer."""
        return self.inputs if data.rows is None else min(self.inputs, data.rows)

    def warnings(self, data: Mapping[str, OpenSet]) -> list[str]:
        """What people should know before the work starts."""
        return []

    def plan_warnings(self, fittable: Fittable) -> list[str]:
        """The same of the models. Raises RequestError where they are unsuitable."""
        return []

    def check(self, finetuned: Mapping[str, Checkpoint], data: Mapping[str, OpenSet]) -> None:
        """Check before the work starts. Raises RequestError if the inputs are unsuitable."""

    @abstractmethod
    def describe(self) -> str:
        """For people: the settings, in one line."""

    @abstractmethod
    def cost(self, fittable: Fittable) -> Cost | None:
        """What it will cost; None where there is nothing to fit."""

    @abstractmethod
    def fit(self, job: FitJob) -> tuple[FittedValues | None, dict[str, Any]]:
        """The fitted values (None where the plain stitch is best), and what to record. Raises RequestError."""

    def how_found(self, record: Mapping[str, Any]) -> str | None:
        """How the values were found, for a sentence that ends with it; None where they are as without a fit."""
        return "fitted to what the finetuned models compute" if record.get("refitted") else None

    @abstractmethod
    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        """Its section of the model card, Markdown. record: as `fit` returned it. inputs: a table of the inputs."""


class LayerByLayer(OnInputs):
    """batch: inputs that pass through the models together; results depend on it only through rounding. device: "auto"
    (the accelerator, if there is one) or as torch names it. states_on: where the hidden states of a batch are kept
    while others run: "cpu" is main memory, "disk" is files.
    """

    batch: int = Field(default=32, ge=1)
    device: DeviceName = AUTO
    states_on: Literal["device", "cpu", "disk"] = "device"


class Stitcher(LayerByLayer):
    """A way to determine the values under masks other than the mean: `stitch: {method: NAME}` in a recipe."""

    if TYPE_CHECKING:  # a field of each stitcher, a Literal
        method: Any = None
