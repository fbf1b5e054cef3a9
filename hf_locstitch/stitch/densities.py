"""How much of each task vector a method keeps: one density for all finetunes, or one for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hf_locstitch.stitch.per_tensor import PerTensor, value_for


class Densities(BaseModel):
    """density: share of each task vector's entries that is kept. densities: in its place one for each finetune, in
    their order: a number, or numbers by globs of tensors."""

    of_finetunes: ClassVar[tuple[str, ...]] = ("densities",)
    density: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)
    densities: tuple[PerTensor, ...] = ()

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Densities:
        if self.densities and "density" in self.model_fields_set:
            raise ValueError("density and densities are both given; drop one")
        if wrong := [number for number in self.every_density if not 0 < number <= 1]:
            raise ValueError(f"a density is greater than 0 and at most 1, not {wrong[0]:g}")
        return self

    @model_serializer(mode="wrap")
    def _dump_the_one(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = "density" if self.densities else "densities"
        return {field: value for field, value in dump(self).items() if field != unused}

    @property
    def every_density(self) -> Iterator[float]:
        """All that are given."""
        for one in self.densities or (self.density,):
            yield from one.values() if isinstance(one, Mapping) else (one,)

    def density_of(self, tensor: str, model: int) -> float:
        """model: number of the finetune."""
        return value_for(self.densities[model], tensor, self.density) if self.densities else self.density
