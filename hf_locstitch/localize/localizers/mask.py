"""Localizing by learning: S = argmin loss(base + σ(S)·τ) + penalty·‖σ(S)‖₁, and the mask is where S is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hf_locstitch.localize.data_localizer import DataLocalizer
from hf_locstitch.localize.job import Group
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.shares import exact_share

if TYPE_CHECKING:
    from hf_locstitch.localize.grafted_model import GraftedModel
    from hf_locstitch.localize.learn import Learned, Room
    from hf_locstitch.tasks.task import Task

IDLE = 16  # the paper's batch, which is recorded but does nothing where one step an epoch is taken on the mean
_RELEASED = {"density": None, "epochs": 10, "lr": 1e7, "relative_lr": False, "start": (-5.0, 5.0),
             "start_density": 1e-5}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Ours: steps measured in logits, so that they suit any model and loss. It starts near the base, where gradients
        # show what a sparse graft needs, and not halfway, where every weight is half finetuned. docs/quality.md
        # compares other starts.
        "default": {"density": 0.01, "epochs": 5, "lr": 4.0, "relative_lr": True, "penalty": 0.0, "start": (-3.0, -2.0),
                    "start_density": None, "batch": IDLE},
        # The paper's text.
        "paper": {"density": 0.01, "epochs": 10, "lr": 1e7, "relative_lr": False, "penalty": 1e-5, "start": (0.0, 3.0),
                  "start_density": None, "batch": IDLE},
        # The authors' published code with its values, for language and for vision: for comparison with it only.
        "official": {**_RELEASED, "penalty": 10.0, "batch": 8},
        "official-vision": {**_RELEASED, "penalty": 1.0, "batch": 128},
    }
)  # fmt: skip
EXPECTED = 0.01  # the paper's density, where nothing else is asked for
FAR = 10  # times more or less than that: a mask that is rounded has come out saturated, or next to empty


class Mask(DataLocalizer):
    """density: share of elements that a mask keeps; None rounds σ(S), as the paper does.

    preset: gives the defaults of the other fields. start: S outside and inside the initial mask, the
    top `start_density` (default: the density, else 0.01) by |τ|. One step per epoch, on the gradient over the whole
    set. relative_lr: S changes by less than lr per step, the k-th most changed element by half of it; else lr is
    absolute. penalty: weight of ‖σ(S)‖₁. batch: for the `official` presets, whose gradient is a sum over batches; that
    of the others is the mean over the set, whatever its batches.
    """

    method: Literal["mask"] = "mask"
    density: float | None = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    preset: Literal["default", "paper", "official", "official-vision"] = "default"
    epochs: int = Field(default=0, ge=0)
    lr: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_lr: bool = False
    penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    start: tuple[float, float] = (0.0, 0.0)
    start_density: float | None = Field(default=None, gt=0, le=1)
    batch: int = Field(default=IDLE, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, value: Any) -> Any:
        preset = PRESETS.get(value.get("preset", "default")) if isinstance(value, dict) else None
        return {**preset, **value} if preset else value

    @model_validator(mode="after")
    def _batch_does_something(self) -> Mask:
        if not self.official and self.batch != IDLE:
            raise ValueError(
                f"batch does nothing in the preset {self.preset}, whose gradient is the mean over the whole set; drop "
                "it, or set micro_batch for the memory"
            )
        return self

    @property
    def official(self) -> bool:
        """Whether S is updated as in the authors' published code."""
        return self.preset.startswith("official")

    def groups(self, numels: Sequence[int]) -> list[Group]:
        """As Localizer.groups. Where σ(S) is rounded, k is only an estimate."""
        return [(list(range(len(numels))), self.kept(numels))]

    def kept(self, numels: Sequence[int]) -> int:
        """Number of ones in a mask over tensors of these sizes (k); where σ(S) is rounded, in the initial mask."""
        n = sum(numels)
        return self.started(n) if self.density is None else exact_share(self.density, n)

    @property
    def together(self) -> int:
        """As WithData.together; for the `official` presets at most one of their batches."""
        return min(super().together, self.batch) if self.official else super().together

    def batches(self, examples: int) -> int:
        """As WithData.batches; for the `official` presets, each of their batches is split by itself."""
        size = min(self.batch, examples) if self.official else examples
        full, rest = divmod(examples, size) if size else (0, 0)
        return full * super().batches(size) + super().batches(rest)

    def started(self, n: int) -> int:
        """How many of n elements start inside the mask."""
        share = self.start_density if self.start_density is not None else self.density
        return exact_share(0.01 if share is None else share, n)

    def describe(self) -> str:
        share = "rounded" if self.density is None else f"density {self.density:g}"
        rate = f"{'relative ' if self.relative_lr else ''}learning rate {self.lr:g}"
        return f"mask, {share}, learned in {counted(self.epochs, 'epoch')}, {rate}, preset {self.preset}"

    def doubt(self, ones: int, n: int) -> str | None:
        """As Localizer.doubt: where σ(S) is rounded, a density far from what was expected."""
        expected = EXPECTED if self.official else self.start_density or EXPECTED
        if self.density is not None or (ones and 1 / FAR <= ones / n / expected <= FAR):
            return None
        few = ones < expected * n
        state = "empty" if not ones else "almost empty" if few else "saturated"
        penalty = "" if self.official else f"{'lower' if few else 'raise'} the penalty (now {self.penalty:g}), or "
        return (
            f"keeps {ones:,} of {n:,} elements ({100 * ones / n:.3g} %), where about {100 * expected:g} % were to be "
            f"expected: rounding σ(S) left it {state}. Set a density, such as {expected:g}, to keep exactly the "
            f"largest S; or {penalty}lower the lr (now {self.lr:g})."
        )

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
