"""The localizers, one file each, and those of other packages (entry points hf_locstitch.localizers)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.localize.localizer import Localizer

LOCALIZERS: Registry[Localizer] = Registry(__name__, __path__, "hf_locstitch.localizers")
