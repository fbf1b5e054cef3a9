"""One mask for all finetunes: where the solution of the refit without data changes the base most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.localize.density import TopShare
from hf_locstitch.runtime.devices import AUTO, DeviceName
from hf_locstitch.runtime.packages import MODELS

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_source import MaskSource
    from hf_locstitch.localize.job import LocalizeJob


class Joint(TopShare):
    """density, scope: as in Magnitude, of the one mask. device: "auto" (the accelerator, if there is one) or as
    torch names it.

    Its values are solved together: it is combined with `stitch: refit`.
    """

    method: Literal["joint"] = "joint"
    joint: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = MODELS
    density: float = Field(default=0.3, gt=0, le=1, allow_inf_nan=False)
    device: DeviceName = AUTO

    def describe(self) -> str:
        return f"one joint mask, density {self.density:g}, largest change of the solution without data {self.where}"

    def scoring(self) -> None:
        """What it solves for is solved again with the mask, in the same folder."""

    def find_masks(self, job: LocalizeJob) -> Mapping[str, MaskSource]:
        from hf_locstitch.localize.joint_mask import find_joint_mask  # slow to import

        return find_joint_mask(job, self.device)


COMPONENT = Joint
