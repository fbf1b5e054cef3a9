"""The objectives, one file each, and those of other packages (entry points hf_locstitch.objectives)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.tasks.objective import Objective

OBJECTIVES: Registry[Objective] = Registry(__name__, __path__, "hf_locstitch.objectives")
