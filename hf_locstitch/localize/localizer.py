"""Any localizer, as a recipe names it by `method`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, Field

from hf_locstitch.localize.magnitude import Magnitude
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.saliency import Saliency

Localizer = Annotated[Magnitude | Mask | Saliency, Field(discriminator="method")]
LOCALIZERS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {"magnitude": Magnitude, "mask": Mask, "saliency": Saliency}
)
