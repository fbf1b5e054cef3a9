"""The forms, one file each, and those of other packages (entry points hf_locstitch.forms)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.exports.form import Form

FORMS: Registry[Form] = Registry(__name__, __path__, "hf_locstitch.forms")
