"""The methods, one file each, and those of other packages (entry points hf_locstitch.methods)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.runtime.registry import Registry

if TYPE_CHECKING:
    from hf_locstitch.stitch.method import Method

METHODS: Registry[Method] = Registry(__name__, __path__, "hf_locstitch.methods")
