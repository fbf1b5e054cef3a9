"""What all localizers that use data have in common: how they use the machine, and what they learn."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.runtime.devices import AUTO, DeviceName
from hf_locstitch.runtime.packages import WITH_DATA

if TYPE_CHECKING:
    from hf_locstitch.localize.grafted_model import GraftedModel
    from hf_locstitch.localize.learn import Learned, Room
    from hf_locstitch.tasks.task import Task

MICRO_BATCH = 8  # examples, unless the recipe or the memory needed overrides it


class WithData(Localizer):
    """micro_batch: examples that pass through the model together; results depend on it only through rounding. With the
    whole set in one, `mask` needs no second number per parameter: "auto" does so where the additional activations take
    less memory than that number, judging by headers and configs, and is 8 otherwise.

    state_dtype: of the numbers kept for every localizable parameter; bfloat16 is rounded stochastically. state_on:
    where they are kept; "disk" is a mapped file. checkpointing: recompute activations in place of keeping them.
    device: "auto" (the accelerator, if there is one) or as torch names it. seed: of the stochastic rounding.
    sharded: shard the parameters over the processes (FSDP2), for models larger than one device.
    """

    needs_data: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = WITH_DATA

    micro_batch: int | Literal["auto"] = "auto"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    state_on: Literal["device", "cpu", "disk"] = "device"
    checkpointing: bool = False
    device: DeviceName = AUTO
    sharded: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _no_device_map(cls, value: Any) -> Any:
        if isinstance(value, dict) and "device_map" in value:
            raise ValueError(
                "device_map is not supported: with weights offloaded to disk, only some parameters get a gradient. "
                "Use checkpointing, state_on: cpu, or several processes"
            )
        return value

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError('it must be "auto" or a whole number of examples, 1 or more')
        return value

    @property
    def together(self) -> int:
        """Examples in a micro-batch; the default size while "auto" is not settled."""
        return MICRO_BATCH if self.micro_batch == "auto" else self.micro_batch

    def batches(self, examples: int) -> int:
        """The number of micro-batches for so many examples."""
        return -(-examples // self.together)

    def comes_whole(self, batches: int, processes: int) -> bool:
        """Whether one micro-batch per process is the whole set: one backward pass then gives the complete gradient."""
        return batches <= processes if self.sharded else batches == processes == 1

    def numbers(self, examples: int, processes: int) -> int:
        """Numbers kept per parameter while learning from so many examples."""
        return 1

    @abstractmethod
    def passes(self, numbers: int) -> int:
        """Passes over the set of one finetune, where so many numbers are kept per parameter."""

    @abstractmethod
    def learn(self, grafted: GraftedModel, task: Task, room: Room) -> Learned:
        """A number for every localizable element: a mask keeps the largest. Raises as pass_over."""
