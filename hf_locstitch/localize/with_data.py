"""What every localizer that looks at data has in common: how it uses the machine, and what it learns."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hf_locstitch.localize.localizer import Localizer

if TYPE_CHECKING:
    from hf_locstitch.localize.grafted_model import GraftedModel
    from hf_locstitch.localize.learn import Learned, Room
    from hf_locstitch.tasks.task import Task

MICRO_BATCH = 8  # examples, unless the recipe or the memory of a mask says else


class WithData(Localizer):
    """micro_batch: examples that pass through the model together; results do not depend on it but for rounding. One
    that holds the whole set spares `mask` a second number for every parameter: "auto" has it so where the
    activations of examples beyond 8 cost less than that number, as told from headers and configs, and is 8 else.

    state_dtype: of the numbers kept for every localizable parameter; bfloat16 is rounded at random. state_on: where
    they lie, "disk" is a file that is mapped. checkpointing: activations are computed twice and not kept.
    device: "auto" takes the accelerator if there is one. seed: of the random rounding.
    sharded: parameters are shared out over the processes (FSDP2), for models larger than one device.
    """

    needs_data: ClassVar[bool] = True

    micro_batch: int | Literal["auto"] = "auto"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    state_on: Literal["device", "cpu", "disk"] = "device"
    checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharded: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _no_device_map(cls, value: Any) -> Any:
        if isinstance(value, dict) and "device_map" in value:
            raise ValueError(
                "device_map is refused: with weights offloaded to disk only some parameters get a gradient, silently. "
                "Use checkpointing, state_on: cpu, or several processes"
            )
        return value

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError('it should be "auto" or a whole number of examples, 1 or more')
        return value

    @property
    def together(self) -> int:
        """Examples in a micro-batch; of "auto", where nothing has settled it."""
        return MICRO_BATCH if self.micro_batch == "auto" else self.micro_batch

    def batches(self, examples: int) -> int:
        """Into how many micro-batches so many examples fall."""
        return -(-examples // self.together)

    def comes_whole(self, batches: int, processes: int) -> bool:
        """Whether the backward pass of one micro-batch makes the gradient of all of them."""
        return batches <= processes if self.sharded else batches == processes == 1

    def numbers(self, examples: int, processes: int) -> int:
        """Kept for a parameter while it learns from so many examples."""
        return 1

    @abstractmethod
    def passes(self, numbers: int) -> int:
        """Over the set of one finetune, where so many numbers are kept for a parameter."""

    @abstractmethod
    def learn(self, grafted: GraftedModel, task: Task, room: Room) -> Learned:
        """A number for every localizable element: the larger, the sooner a mask keeps it. Raises as pass_over."""
