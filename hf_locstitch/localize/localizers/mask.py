"""Localizing by learning: S = argmin loss(base + σ(S)·τ) + penalty·‖σ(S)‖₁, and the mask is where S is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hf_locstitch.localize.data_localizer import DataLocalizer
from hf_locstitch.localize.job import Group
from hf_locstitch.runtime.shares import exact_share

if TYPE_CHECKING:
    from hf_locstitch.localize.grafted_model import GraftedModel
    from hf_locstitch.localize.learn import Learned, Room
    from hf_locstitch.tasks.task import Task

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Ours: steps measured in logits, so that they suit any model and loss. It starts near the base, where gradients
        # show what a sparse graft needs, and not halfway, where every weight is half finetuned. docs/quality.md
        # compares other starts.
        "default": {"epochs": 5, "lr": 4.0, "relative_lr": True, "penalty": 0.0, "start": (-3.0, -2.0)},
        # The paper's text.
        "paper": {"epochs": 10, "lr": 1e7, "relative_lr": False, "penalty": 1e-5, "start": (0.0, 3.0)},
        # The authors' published code, for comparison with it only.
        "official": {"epochs": 10, "lr": 1e7, "relative_lr": False, "penalty": 1e-5, "start": (-5.0, 5.0)},
    }
)


class Mask(DataLocalizer):
    """density: share of elements that a mask keeps; None rounds σ(S), as the paper does.

    preset: gives the defaults of the fields below. start: S outside and inside the initial mask, the
    top `start_density` (default: the density, else 0.01) by |τ|. One step per epoch, on the gradient over the whole
    set. relative_lr: S changes by less than lr per step, the k-th most changed element by half of it; else lr is
    absolute. penalty: weight of ‖σ(S)‖₁. batch: for the `official` preset, whose gradient is a sum over batches.
    """

    method: Literal["mask"] = "mask"
    density: float | None = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    preset: Literal["default", "paper", "official"] = "default"
    epochs: int = Field(default=0, ge=0)
    lr: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_lr: bool = False
    penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    start: tuple[float, float] = (0.0, 0.0)
    start_density: float | None = Field(default=None, gt=0, le=1)
    batch: int = Field(default=16, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, value: Any) -> Any:
        preset = PRESETS.get(value.get("preset", "default")) if isinstance(value, dict) else None
        return {**preset, **value} if preset else value

    def groups(self, numels: Sequence[int]) -> list[Group]:
        """As Localizer.groups. Where σ(S) is rounded, k is only an estimate."""
        return [(list(range(len(numels))), self.kept(numels))]

    def kept(self, numels: Sequence[int]) -> int:
        """Number of ones in a mask over tensors of these sizes (k); where σ(S) is rounded, in the initial mask."""
        n = sum(numels)
        return self.started(n) if self.density is None else exact_share(self.density, n)

    @property
    def together(self) -> int:
        """As WithData.together; for the `official` preset at most one of its batches."""
        return min(super().together, self.batch) if self.preset == "official" else super().together

    def batches(self, examples: int) -> int:
        """As WithData.batches; for the `official` preset, each of its batches is split by itself."""
        size = min(self.batch, examples) if self.preset == "official" else examples
        full, rest = divmod(examples, size) if size else (0, 0)
        return full * super().batches(size) + super().batches(rest)

    def started(self, n: int) -> int:
        """How many of n elements start inside the mask."""
        share = self.start_density if self.start_density is not None else self.density
        return exact_share(0.01 if share is None else share, n)

    def describe(self) -> str:
        share = "rounded" if self.density is None else f"density {self.density:g}"
        rate = f"{'relative ' if self.relative_lr else ''}learning rate {self.lr:g}"
        return f"mask, {share}, learned in {self.epochs} epochs, {rate}, preset {self.preset}"

    def numbers(self, examples: int, processes: int) -> int:
        """A second number where gradients must be accumulated before the step."""
        return 1 if self.comes_whole(self.batches(examples), processes) else 2

    def passes(self, numbers: int) -> int:
        return self.epochs * (2 if numbers == 1 and self.relative_lr else 1)

    def learn(self, grafted: GraftedModel, task: Task, room: Room) -> Learned:
        from hf_locstitch.localize.learn import Learned, count_positive, learn_mask

        state, losses = learn_mask(self, grafted, task, room)
        ones = count_positive(grafted, state) if self.density is None else None
        return Learned(state, losses, ones, ranks=True)


COMPONENT = Mask
