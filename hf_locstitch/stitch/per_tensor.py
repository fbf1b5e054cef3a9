"""A setting that is one number, or one for each tensor by globs over names: `{"*.mlp.*": 0.8, "*": 0.5}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, TypeAlias

from pydantic import Field

SMALLEST_SUM = 1e-9  # of weights that is divided by; below it they cancel but for rounding

Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
PerTensor: TypeAlias = Number | dict[str, Number]


def value_for(setting: float | Mapping[str, float], tensor: str, default: float) -> float:
    """The number of the first glob that matches a tensor's name; the default where none does."""
    if not isinstance(setting, Mapping):
        return float(setting)
    return float(next((number for glob, number in setting.items() if fnmatchcase(tensor, glob)), default))


def globs_of(setting: float | Mapping[str, float]) -> Iterator[str]:
    """The globs that have to match something."""
    if isinstance(setting, Mapping):
        yield from (glob for glob in setting if glob != "*")


def describe(settings: Mapping[str, PerTensor]) -> str:
    """For people: settings by name, in one line."""
    return "; ".join(f"{name} {_numbers(setting)}" for name, setting in settings.items())


def _numbers(setting: PerTensor) -> str:
    if isinstance(setting, Mapping):
        return ", ".join(f"{number:g} in {glob}" for glob, number in setting.items())
    return f"{setting:g}"


@dataclass(frozen=True)
class Weights:
    """Factors on the task vectors of finetunes. settings: of each, in summation order."""

    settings: Sequence[PerTensor]

    def of(self, tensor: str) -> tuple[float, ...]:
        """Of each finetune, in a tensor."""
        return tuple(value_for(setting, tensor, 1.0) for setting in self.settings)


NO_WEIGHTS = Weights(())
