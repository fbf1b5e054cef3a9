"""Names of devices, as torch knows them."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

AUTO, CPU = "auto", "cpu"
DeviceName = Annotated[str, StringConstraints(pattern=r"^[a-z]+(:\d+)?$")]
